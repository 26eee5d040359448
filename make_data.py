"""Make the toy world: clips with known events, and the paper's structured data pipeline on them.

    python make_data.py                      # data/: 1,400 clips, 16-bit WAV, 260 MB
    python make_data.py --sounds DIR         # recorded sounds: a folder of WAV files for each kind

A generator knows the true events of a clip and writes
    A1 description  A2 speech  A3 music  A4 timestamped events  A5 duration       -> clips.jsonl
    question, four choices, answer and a grounded chain of thought (QA+CoT), by rule
A known share of the QA+CoT is broken on purpose. A judge, which sees the row and the events but not
what was planted, gives two verdicts and so sorts the rows:
    [QA valid] and [CoT valid] -> sft.jsonl     only [QA valid] -> rl.jsonl, chain dropped
    QA invalid -> discarded.jsonl; each row with the judge's reason
test.jsonl holds questions on clips of its own.
"""
# SPDX-License-Identifier: MIT
import io
import json
import math
import os
import re
import struct
import wave
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchaudio
from tqdm import tqdm

from echo import SAMPLE_RATE, EchoError, main, parse_settings, same_answer

SYNTHETIC = ("hum", "rumble", "buzz", "tone", "chirp", "bell", "whistle", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # pulses in a sound: the detail
QUESTIONS = {"count": "How many pulses has the {}?",
             "order": "Which sound comes right after the {}?",
             "count_after": "How many pulses has the sound right after the {}?",
             "find": "How many pulses has the sound right after the {}?"}  # the fast hum
SPEEDS = {2: "slow", 3: "slow", 4: "fast", 5: "fast", 6: "fast"}
CELL_S = 0.5  # of the thumbnail: it says in which cells a sound is, not how many pulses it has


@dataclass
class Settings:
    out: str = "data"         # folder to write
    train_clips: int = 1200   # one row of each category per clip
    test_clips: int = 200
    clip_s: float = 6.0       # length of a clip, in whole cells of half a second
    seed: int = 0             # same seed, same bytes
    sounds: str = ""          # a folder with a folder of WAV files for each kind, five or more


def carrier(kind, t, rng):
    """The sound of a kind at times `t` (seconds), unit power; its pitch varies by 15%."""
    pitch = rng.uniform(0.85, 1.15)
    if kind in ("rumble", "hiss"):  # noise below 250 Hz, noise above 4 kHz
        spectrum = np.fft.rfft(rng.standard_normal(t.size))
        hz = np.fft.rfftfreq(t.size, 1 / SAMPLE_RATE)
        spectrum[hz > 250 * pitch if kind == "rumble" else hz < 4000 * pitch] = 0
        sound = np.fft.irfft(spectrum, t.size)
    elif kind == "chirp":           # 30 upward sweeps a second, 700 to 1,900 Hz
        phase = (30 * t) % 1.0
        sound = np.sin(2 * np.pi * pitch * (700 * phase + 600 * phase ** 2) / 30)
    else:
        hz = {"hum": (110, 330), "buzz": tuple(220 * k for k in range(1, 16, 2)), "tone": (900,),
              "bell": (1250, 2070, 3110, 4390), "whistle": (2600,)}[kind]
        weights = 1 / np.arange(1, len(hz) + 1) if kind == "buzz" else np.ones(len(hz))
        sound = sum(w * np.sin(2 * np.pi * pitch * f * t) for w, f in zip(weights, hz))
    return sound / np.sqrt(np.mean(sound ** 2))


def steady(path):
    """A recording without its pauses and at one loudness over 50 ms, so that its own rise and fall
    is not taken for pulses."""
    recording, n = load_audio(path).numpy(), SAMPLE_RATE // 20
    if np.abs(recording).max() < 1e-4:
        raise EchoError(f"{path}: silent")
    recording = np.resize(recording, max(len(recording), SAMPLE_RATE))  # a short one, repeated
    loudness = np.sqrt(np.convolve(recording ** 2, np.ones(n) / n, mode="same") + 1e-12)
    audible = loudness > 0.03 * loudness.max()
    return (recording / loudness)[audible]


def read_sounds(folder):
    """Recordings by kind, {kind: [(N,), ...]}."""
    sounds = {}
    for path in tqdm(sorted(p for p in Path(folder).glob("[!.]*") if p.is_dir()), "recordings"):
        kind = re.sub("[^a-z0-9]+", "-", path.name.lower()).strip("-")
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".wav")
        if kind in sounds or not kind or not files:
            raise EchoError(f"{path}: {len(files)} WAV files for kind {kind!r}; needed: at least "
                            "one, and a name that no other folder has")
        sounds[kind] = [steady(p) for p in files]
    if len(sounds) < 5:
        raise EchoError(f"--sounds {folder}: {len(sounds)} folders; needed: one for each kind of "
                        "sound, five or more")
    return sounds


def from_edge(n_pulses, t):
    """How far inside a pulse time `t` (0 to 1 over the sound) lies, in periods; else negative."""
    return 0.3 - abs(t * n_pulses % 1.0 - 0.5)


def pulse_train(n_pulses, n_samples, ramp_s):
    """(n_samples,) envelope of equal pulses, on 60% of the time: an average over half a second (the
    first listen) says nothing about the number."""
    edge = from_edge(n_pulses, (np.arange(n_samples) + 0.5) / n_samples)
    length_s = n_samples / SAMPLE_RATE
    return np.clip(edge / n_pulses * length_s / ramp_s + 0.5, 0, 1)  # ramps centred on the edges


def room(t, rng):
    """Background noise, white to brown, and in half the rooms a hum of the mains."""
    noise = np.fft.rfft(rng.standard_normal(t.size))
    noise[1:] /= np.arange(1, noise.size) ** rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(noise, t.size)
    noise *= 10 ** (rng.uniform(-60, -42) / 20) / noise.std()
    if rng.random() < 0.5:
        hum = np.sin(2 * np.pi * rng.choice([50, 60]) * rng.integers(1, 11) * t)
        noise += 10 ** (rng.uniform(-60, -36) / 20) * hum
    return noise


def arrange(rng, kinds, clip_s):
    """The sounds of a clip, [(kind, start_s, end_s), ...], 0.8 to 1.5 s long, at least 0.1 s apart.
    One kind comes one to three times, never twice in a row, and each time something follows it."""
    searched, *others = map(str, rng.permutation(kinds))
    n_searched = int(rng.choice([1, 2, 2, 3, 3]))
    n_others = max(n_searched, rng.integers(2, 4))  # in 6 s
    n = round(clip_s / 6 * (n_searched + n_others))
    rest = others[2:] * n  # in a long clip some come again
    order = ([searched] * n_searched + others[:2] + rest)[:n]
    while order[-1] == searched or any(a == b for a, b in zip(order, order[1:])):
        order = [order[i] for i in rng.permutation(len(order))]
    spare_s = rng.dirichlet([1] * (2 * n + 1)) * (clip_s - 0.9 * n)  # shared by 2 n and the end
    length_s = 0.8 + np.minimum(spare_s[:n], 0.7)
    end_s = np.cumsum(spare_s[n:-1] + length_s + 0.1) - 0.1
    return [(kind, round(float(end - length), 2), round(float(end), 2))
            for kind, length, end in zip(order, length_s, end_s)]


def synthesise(rng, recordings=None, clip_s=6.0):
    """One clip: (N,) float samples in [-1, 1] and its events, in order of time. recordings: by
    kind; None: the synthetic kinds."""
    t = np.arange(round(clip_s * SAMPLE_RATE)) / SAMPLE_RATE
    clip, events = room(t, rng), []
    sounds = arrange(rng, sorted(recordings or SYNTHETIC), clip_s)
    kinds = [kind for kind, _, _ in sounds]
    odd_one = {k: rng.integers(kinds.count(k)) for k in kinds}  # it alone has another speed
    speeds = rng.permutation(["slow", "fast"])
    for kind, start_s, end_s in sounds:
        nth = sum(e["kind"] == kind for e in events)
        speed = speeds[int(nth == odd_one[kind])]
        pool = [n for n in NUMBERS if kinds.count(kind) == 1 or SPEEDS[n] == speed]
        pulses = int(rng.choice(pool))
        a, b = round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
        if recordings:
            recording = recordings[kind][rng.integers(len(recordings[kind]))]
            sound = np.resize(np.roll(recording, -rng.integers(len(recording))), b - a)
        else:
            sound = carrier(kind, t[a:b], rng)
        level = 10 ** (rng.uniform(-22, -14) / 20)
        clip[a:b] += level * sound * pulse_train(pulses, b - a, rng.choice([0.001, 0.004, 0.012]))
        events.append({"kind": kind, "start_s": start_s, "end_s": end_s, "pulses": pulses})
    if rng.random() < 0.5:  # half the rooms have an echo
        late = int(rng.uniform(0.03, 0.15) * SAMPLE_RATE)
        clip[late:] += 10 ** (rng.uniform(-20, -8) / 20) * clip[:-late]
    return np.clip(clip, -1, 1), events


def segment_of(event):
    """The cells that hold over 0.05 s of a sound, (start_s, end_s): what a thumbnail can know of
    its place."""
    return (math.floor((event["start_s"] + 0.05) / CELL_S) * CELL_S,
            math.ceil((event["end_s"] - 0.05) / CELL_S) * CELL_S)


def point_to(event, lead="Right after it"):
    """A sentence that points to a sound, and says what is heard there."""
    start_s, end_s = segment_of(event)
    return (f"{lead} <seg>{start_s:.1f}, {end_s:.1f}</seg> the {event['kind']} has "
            f"{NUMBERS[event['pulses']]} pulses and is {SPEEDS[event['pulses']]}.")


def look_for(events):
    """Such a sentence for each sound of a kind, in order of time."""
    return [point_to(e, f"I look for the {'next ' if i else ''}{e['kind']}")
            for i, e in enumerate(events)]


def questions_about(events):
    """Every question that a clip can answer, with answer, grounded chain and the events that the
    chain listens to. A name must mean one sound: to find, it has the speed, too, which only
    listening tells; the others of its kind, two at most, have the other speed."""
    rows = []
    for category, form in QUESTIONS.items():
        for i, event in enumerate(events):
            alike = [e for e in events if e["kind"] == event["kind"]]
            name, meant = event["kind"], alike  # the sounds that the name can mean
            if category == "find":
                speed = SPEEDS[event["pulses"]]
                name, meant = f"{speed} {name}", [e for e in alike if SPEEDS[e["pulses"]] == speed]
            after = events[i + 1:] if category != "count" else [event]
            if len(meant) > 1 or len(alike) > 3 or not after:
                continue
            looks = alike[:alike.index(event) + 1]
            steps, target = look_for(looks), after[0]
            if category != "count":
                steps.append(point_to(target))
                looks.append(target)
            answer = target["kind"] if category == "order" else NUMBERS[target["pulses"]]
            cot = f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"
            rows.append({"question": form.format(name), "answer": answer, "cot": cot,
                         "category": category, "name": name, "candidates": len(alike),
                         "listen_to": looks})
    return rows


def pick(category, events, rng):
    """A question of a category; to find, among as many sounds as there are."""
    rows = [row for row in questions_about(events) if row["category"] == category]
    most = max(row["candidates"] for row in rows)
    return rng.choice([row for row in rows if row["candidates"] == most])


def write_row(category, events, rng, kinds=SYNTHETIC):
    """A question of a category about a clip, and four choices; keys as in published rows."""
    true = pick(category, events, rng)
    pool = kinds if category == "order" else NUMBERS.values()
    wrong = [x for x in pool if x not in (true["answer"], true["name"])]
    choices = rng.permutation([true["answer"], *rng.choice(wrong, 3, replace=False)])
    return {"question": true["question"], "multi_choice": list(map(str, choices)),
            **{k: true[k] for k in ("answer", "cot", "listen_to", "category")}}


# Faults to plant: where each stands in a row's JSON
QA_FAULTS = {"wrong_answer": r'"answer": "(.+?)"', "absent_sound": r'(\S+)\?", "multi',
             "lost_choice": r'"multi_choice": .*"(.+?)".*\], "answer": "\1"'}
COT_FAULTS = {"shift_segment": r"<seg>(\d.\d)", "no_segment": r"(<seg>\S+ \S+ )",
              "miscount": r"</seg> the \S+ has (\w+)", "misname": r"</seg> the (\S+)",
              "contradict": r"<answer>(.+)</answer>", "skip_one": r"(I look for .+?\. )I",
              "stop_early": r"( I look for the next [^>]+>[^>]+> [^.]+\.) Right"}
QA_FAULT_SHARE = 0.06   # of the rows
COT_FAULT_SHARE = 0.11  # of the looks: the paper's RL and SFT sets are as 22 to 76


def plant(row, kinds, rng):
    """Break a known share of the rows: in a row's JSON something else stands where a fault's
    pattern matches. Returns the row, and the fault's name."""
    text, draw, faults = json.dumps(row), rng.random(), {}
    if draw < QA_FAULT_SHARE:
        faults = QA_FAULTS
    elif draw < QA_FAULT_SHARE + COT_FAULT_SHARE * len(row["listen_to"]):
        faults = COT_FAULTS
    possible = [fault for fault in faults if re.search(faults[fault], text)]
    if not possible:
        return row, "intact"
    fault = str(rng.choice(possible))
    pool = {"wrong_answer": row["multi_choice"], "contradict": row["multi_choice"],
            "absent_sound": ["siren"], "lost_choice": ["siren"],
            "shift_segment": [f"{t / 2:.1f}" for t in range(12)], "miscount": NUMBERS.values(),
            "misname": kinds}.get(fault, [""])
    said = re.search(faults[fault], text)
    new = rng.choice([x for x in pool if x != said[1]])
    return json.loads(text[:said.start(1)] + str(new) + text[said.end(1):]), fault


def judge(row, events):
    """[QA valid] and [CoT valid]: which set a row belongs to, and what is wrong with it. The truth
    is rebuilt from the events: every question that the clip can answer, with answer and chain."""
    asked = {true["question"]: true for true in questions_about(events)}
    truth = asked.get(row["question"])
    if not truth:
        return "discarded", "the question has no known form, or no answer in this clip"
    if len(set(row["multi_choice"])) != 4 or truth["answer"] not in row["multi_choice"]:
        return "discarded", f"not four different choices with the truth, {truth['answer']}"
    if row["answer"] != truth["answer"]:
        return "discarded", f"the answer is {row['answer']}, the truth {truth['answer']}"
    if row["cot"] != truth["cot"]:
        return "rl", "the chain is not the true one"
    return "sft", ""


def make_clip(settings, split, i, recordings, kinds):
    """Write the WAV file of a clip; its A1 to A5, a row of each category, and its generator."""
    rng = np.random.default_rng([settings.seed, split == "test", i])
    samples, events = synthesise(rng, recordings, settings.clip_s)
    name, path = f"{split}-{i:05d}", f"audio/{split}/{i:05d}.wav"
    write_atomically(Path(settings.out) / path, wav_bytes(samples))
    said = ", ".join(f"a {e['kind']}" for e in events)
    clip = {"id": name, "audio_path": path, "A1_description": f"A recording with {said}.",
            "A2_speech": "none", "A3_music": "none", "A4_events": events,
            "A5_duration_s": settings.clip_s}
    rows = [{"id": f"{name}-{category}", "audio_path": path,
             **write_row(category, events, rng, kinds)} for category in QUESTIONS]
    return clip, rows, rng


def run():
    settings = parse_settings(Settings, __doc__)
    sounds = read_sounds(settings.sounds) if settings.sounds else None
    if settings.clip_s < 6 or settings.clip_s % CELL_S:
        raise EchoError(f"--clip-s {settings.clip_s}: needed: 6 or more, in whole half seconds")
    kinds = sorted(sounds or SYNTHETIC)
    clips, test, verdicts = [], [], Counter()
    sets = {"sft": [], "rl": [], "discarded": []}
    for i in tqdm(range(settings.train_clips), "train clips"):
        clip, rows, rng = make_clip(settings, "train", i, sounds, kinds)
        clips.append(clip)
        for row in rows:
            row, fault = plant(row, kinds, rng)
            verdict, row["reason"] = judge(row, clip["A4_events"])
            if verdict == "rl":
                del row["cot"]
            sets[verdict].append(row)
            verdicts[fault, verdict] += 1
    for i in tqdm(range(settings.test_clips), "test clips"):
        test += make_clip(settings, "test", i, sounds, kinds)[1]
    for name, rows in {"clips": clips, **sets, "test": test}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(Path(settings.out) / f"{name}.jsonl", lines)
    print("\nplanted, and what the judge makes of it:")
    for (fault, verdict), n in sorted(verdicts.items()):
        print(f"{fault:<14} -> {verdict:<9} {n:>6}")
    print(f"\ntest: {len(test)} questions on {settings.test_clips} clips of their own. A row:\n"
          f"{json.dumps((sets['sft'] + test)[0], indent=2)}")


# ==================================================================================================
# From here on: reading and writing, the toy's data and your own.

def write_atomically(path, data):
    """Write text or bytes: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk: its own message names no file
        raise EchoError(f"{path}: can't be written ({error})") from None
    os.replace(temporary, path)


def wav_bytes(samples):
    """(N,) float samples in [-1, 1] as the bytes of a 16-bit mono WAV file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))  # mono, two bytes a sample
        file.writeframes((np.asarray(samples) * 32767).round().astype("<i2").tobytes())
    return data.getvalue()


def read_wav(path):
    """A WAV file, 8 to 32-bit integer or 32-bit float PCM -> (N, channels) float32, rate in Hz."""
    data, chunks, at = Path(path).read_bytes(), {}, 12
    while at + 8 <= len(data) and data[:4] == b"RIFF":
        name, size = struct.unpack("<4sI", data[at:at + 8])
        left = len(data) - at - 8
        if name == b"data" and (size == 0 or size >= 0x7FFF_0000):  # a stream, never closed
            size = left
        if name == b"data" and left < size:
            raise EchoError(f"{path}: broken WAV, {left} of {size} bytes of audio are there")
        chunks.setdefault(name, data[at + 8:at + 8 + size])
        at += 8 + size + size % 2
    header, audio = chunks.get(b"fmt ", b"").ljust(26, b"\0"), chunks.get(b"data", b"")
    coding, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the coding follows
        coding = struct.unpack("<H", header[24:26])[0]
    width = bits // 8
    known = (coding, bits) in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32)) and \
        channels and frame == channels * width and 1000 <= rate <= 768_000 and \
        rate // math.gcd(rate, SAMPLE_RATE) <= 12_000  # beyond, resampling would take gigabytes
    if not known:
        raise EchoError(f"{path}: not a WAV file of 8 to 32-bit PCM, or a broken one; convert it: "
                        f"ffmpeg -i '{Path(path).name}' '{Path(path).stem}-16k.wav'")
    raw = np.frombuffer(audio[:len(audio) // frame * frame], np.uint8)
    if coding == 3:
        return raw.view("<f4").reshape(-1, channels), rate
    left_aligned = np.zeros((len(raw) // width, 4), np.uint8)  # in 32 bits
    left_aligned[:, 4 - width:] = raw.reshape(-1, width) ^ (128 if bits == 8 else 0)
    samples = left_aligned.view("<i4").astype(np.float32) / 2 ** 31
    return samples.reshape(-1, channels), rate


def load_audio(path):
    """A WAV file as a mono waveform, (N,) float32 at 16 kHz."""
    samples, rate = read_wav(path)
    if not samples.size or not np.abs(samples).max() <= 1e4:
        raise EchoError(f"{path}: empty, or samples that are NaN or beyond 10,000; export it again")
    mono = torch.from_numpy(samples.mean(1, dtype=np.float32))
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE)


def read_rows(path, needs=()):
    """Rows of a JSON list or of JSON lines, each a dict with text under the keys `needs`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            lines = [line for line in text.split("\n") if line.strip()]
            text = "[" + ",\n".join(lines) + "]"
        rows = json.loads(text)
        json.dumps(rows, ensure_ascii=False).encode()  # half a surrogate pair can't be written
    except (ValueError, RecursionError) as error:  # of UTF-8, too; it names the line
        raise EchoError(f"{path}: not UTF-8 or not JSON ({error}); needed: a list of objects, or "
                        "an object a line") from None
    if not rows:
        raise EchoError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        for key in needs:
            if not isinstance(row, dict) or not row.get(key) or not isinstance(row[key], str):
                raise EchoError(f"{path}, row {number}: no text under {key!r}; needed: "
                                f"{', '.join(needs)}")
    return rows


Question = namedtuple("Question", "row path question choices answer category")


def read_questions(path, audio_root="", needs=("answer",)):
    """Questions of a data file, its rows native, MMAR's (choices) or MMAU's (audio_id, choices).
    Audio paths are relative to `audio_root`, or the file's folder. needs: what a row must have
    beside question and choices, for training; else an answer that is no choice becomes None."""
    questions = []
    for number, row in enumerate(read_rows(path, ("question", *needs)), 1):
        audio = row.get("audio_path") or row.get("audio_id")
        choices = row.get("multi_choice") or row.get("choices")
        if not isinstance(audio, str) or not isinstance(choices, list):
            raise EchoError(f"{path}, row {number}: needed: 'audio_path' (or 'audio_id'), and "
                            "'multi_choice' (or 'choices'), a list of texts")
        choices = list(map(str, choices))
        answer = next((c for c in choices if same_answer(c, str(row.get("answer") or ""))), None)
        if needs and not answer:
            raise EchoError(f"{path}, row {number}: the answer {row['answer']!r} is not among the "
                            "choices")
        clip = Path(audio_root or Path(path).parent) / audio
        if needs and not clip.is_file():
            raise EchoError(f"{path}, row {number}: no such file: {clip}")
        category = str(row.get("category") or row.get("task") or "all")
        questions.append(Question(row, clip, row["question"], choices, answer, category))
    return questions


if __name__ == "__main__":
    main(run)
