"""Make the toy world: clips with known events, and the paper's structured data pipeline on them.

    python make_data.py                      # data/: 2,600 clips, 16-bit WAV, 500 MB, half a minute
    python make_data.py --sounds DIR         # recorded sounds: a folder of WAV files for each kind

A generator knows the true events of a clip and writes
    A1 description  A2 speech  A3 music  A4 timestamped events  A5 duration       -> clips.jsonl
    question, four choices, answer and a grounded chain of thought (QA+CoT), by rule
A known share of the QA+CoT is broken on purpose. A judge, which sees the row and the events but not
what was planted, gives two verdicts and so sorts the rows:
    [QA valid] and [CoT valid] -> sft.jsonl     only [QA valid] -> rl.jsonl, chain dropped
    QA invalid -> discarded.jsonl, with the judge's reason
test.jsonl holds questions on clips of its own. Left out: a language model as writer and as judge.
"""
# SPDX-License-Identifier: MIT
import io
import json
import math
import re
import struct
import wave
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchaudio
from tqdm import tqdm

from echo import (SAMPLE_RATE, EchoError, first_line, main, parse_settings, same_answer,
                  write_atomically)

SYNTHETIC = ("hum", "rumble", "buzz", "tone", "chirp", "bell", "whistle", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # pulses in a sound: the detail
QUESTIONS = {"count": "How many pulses has the {}?",
             "order": "Which sound comes right after the {}?",
             "count_after": "How many pulses has the sound right after the {}?"}
CLIP_S = 6.0
SOUND_S = 1.0  # every sound lasts one second ...
GRID_S = 0.5   # ... and starts on this grid, also the thumbnail's: it says where, not how many


@dataclass
class Settings:
    out: str = "data"         # folder to write
    train_clips: int = 2400   # one row of each category per clip
    test_clips: int = 200
    seed: int = 0             # same seed, same bytes
    sounds: str = ""          # a folder with a folder of WAV files for each kind, five or more
    hold_out: float = 0.0     # share of each kind's recordings that the test clips alone have


# ---------------------------------------------------------------------------------- sounds
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


def read_sounds(folder, hold_out, seed):
    """Recordings by kind for training and for the test: {kind: [(N,), ...]} twice."""
    train, test = {}, {}
    folders = sorted(p for p in Path(folder).glob("[!.]*") if p.is_dir())
    if len(folders) < 5:
        raise EchoError(f"--sounds {folder}: {len(folders)} folders; needed: one for each kind of "
                        "sound, five or more")
    for path in tqdm(folders, desc="recordings"):
        kind = re.sub("[^a-z0-9]+", "-", path.name.lower()).strip("-")
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".wav")
        if kind in train or not kind or len(files) < 1 + (hold_out > 0):
            raise EchoError(f"{path}: {len(files)} WAV files for kind {kind!r}; needed: at least "
                            f"{1 + (hold_out > 0)}, and a name that no other folder has")
        recordings = [steady(p) for p in files]
        np.random.default_rng([seed, len(train)]).shuffle(recordings)
        n_held = min(math.ceil(hold_out * len(files)), len(files) - 1)
        train[kind] = recordings[n_held:]
        test[kind] = recordings[:n_held] or recordings
    return train, test


def from_edge(n_pulses, t):
    """How far inside a pulse time `t` (0 to 1 over the sound) lies, in periods; else negative."""
    return 0.3 - abs(t * n_pulses % 1.0 - 0.5)


def pulse_train(n_pulses, n_samples, ramp_s):
    """(n_samples,) envelope of equal pulses, on 60% of the time. It is symmetric about the middle:
    an average over half a second (the first listen) says nothing about the number."""
    edge = from_edge(n_pulses, (np.arange(n_samples) + 0.5) / n_samples)
    return np.clip(edge / n_pulses * SOUND_S / ramp_s + 0.5, 0, 1)  # ramps centred on the edges


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


def synthesise(rng, sounds=None):
    """One clip: (N,) float samples in [-1, 1] and its events, in order of time. sounds: recordings
    by kind; None: the synthetic kinds."""
    n_sounds = int(rng.integers(3, 5))
    slots, per_sound = round(CLIP_S / GRID_S), round(SOUND_S / GRID_S)
    gaps = np.sort(rng.integers(0, slots - n_sounds * per_sound + 1, n_sounds))  # slots before each
    t = np.arange(round(CLIP_S * SAMPLE_RATE)) / SAMPLE_RATE
    clip, events = room(t, rng), []
    kinds = rng.choice(sorted(sounds or SYNTHETIC), n_sounds, replace=False)
    for i, kind in enumerate(map(str, kinds)):
        start_s = float((gaps[i] + i * per_sound) * GRID_S)
        pulses = int(rng.choice(list(NUMBERS)))
        a = round(start_s * SAMPLE_RATE)
        b = a + round(SOUND_S * SAMPLE_RATE)
        if sounds:
            recording = sounds[kind][rng.integers(len(sounds[kind]))]
            sound = np.resize(np.roll(recording, -rng.integers(len(recording))), b - a)
        else:
            sound = carrier(kind, t[a:b], rng)
        level = 10 ** (rng.uniform(-22, -14) / 20)
        clip[a:b] += level * sound * pulse_train(pulses, b - a, rng.choice([0.001, 0.004, 0.012]))
        event = {"kind": kind, "start_s": start_s, "end_s": start_s + SOUND_S, "pulses": pulses}
        events.append(event)
    return np.clip(clip, -1, 1), events


# ---------------------------------------------------------------------------------- QA + CoT
def heard(event):
    return (f"<seg>{event['start_s']:.1f}, {event['end_s']:.1f}</seg> "
            f"the {event['kind']} has {NUMBERS[event['pulses']]} pulses.")


def look_for(event):
    """The sentence that points at a sound, and says what is heard there."""
    return f"I look for the {event['kind']} {heard(event)}"


def then_comes(event):
    return f"Right after it {heard(event)}"


def question_about(category, events, i):
    """The question of a category about event i: its text, its answer, and a grounded chain."""
    target = events[i] if category == "count" else events[i + 1]
    steps = look_for(events[i])
    if target is not events[i]:
        steps += " " + then_comes(target)
    answer = target["kind"] if category == "order" else NUMBERS[target["pulses"]]
    cot = f"<think>{steps}</think><answer>{answer}</answer>"
    return QUESTIONS[category].format(events[i]["kind"]), answer, cot


def all_questions(events):
    """Everything that can be asked about a clip: {question: (answer, chain)}."""
    known = {}
    for category in QUESTIONS:
        for i in range(len(events) - (category != "count")):
            question, answer, cot = question_about(category, events, i)
            known[question] = answer, cot
    return known


def write_row(category, events, rng, kinds=SYNTHETIC):
    """Question, four choices, answer and grounded chain for a clip; keys as in published rows."""
    i = int(rng.integers(len(events) - (category != "count")))
    question, answer, cot = question_about(category, events, i)
    pool = kinds if category == "order" else NUMBERS.values()
    wrong = rng.choice([x for x in pool if x not in (answer, events[i]["kind"])], 3, replace=False)
    choices = [str(c) for c in rng.permutation([answer, *wrong])]
    return {"question": question, "multi_choice": choices, "answer": answer, "cot": cot}


# ---------------------------------------------------------------------------------- planted faults
def other(rng, pool, *but):
    return str(rng.choice([x for x in pool if x not in but]))


def break_qa(fault, row, events, kinds, rng):
    """The keys of a row that change when its question or answer is broken."""
    answer, choices, question = row["answer"], row["multi_choice"], row["question"]
    wrong = other(rng, choices, answer)
    absent = other(rng, kinds, *(e["kind"] for e in events))
    return {"wrong_answer": {"answer": wrong,  # the chain's last word is wrong in the same way
                             "cot": row["cot"].replace(f"<answer>{answer}<", f"<answer>{wrong}<")},
            "absent_sound": {"question": re.sub(r"the (\S+)\?", f"the {absent}?", question)},
            "lost_choice": {"multi_choice": ["siren" if c == answer else c for c in choices]},
            "double_choice": {"multi_choice": [answer if c == wrong else c for c in choices]},
            }[fault]


def break_chain(fault, row, kinds, rng):
    """The chain of a row, with something else where a pattern first matches."""
    pattern, pool = {"shift_segment": (r"<seg>([\d.]+)", [f"{t / 2:.1f}" for t in range(12)]),
                     "past_the_end": (r", ([\d.]+)</seg>", ["7.5"]),
                     "no_segment": ("(<seg>.*?</seg> )", [""]),
                     "miscount": (r"has (\w+) pulses", NUMBERS.values()),
                     "misname": (r"</seg> the (\S+)", kinds),
                     "take_back": ("()</think>", [" Really it has nine pulses."]),
                     "broken_tag": ("(</think>)", [""]),
                     "contradict": ("<answer>(.+)</answer>", row["multi_choice"])}[fault]
    said = re.search(pattern, row["cot"])
    start, end = said.span(1)
    return {"cot": row["cot"][:start] + other(rng, pool, said[1]) + row["cot"][end:]}


QA_FAULTS = ("wrong_answer", "absent_sound", "lost_choice", "double_choice")
COT_FAULTS = ("shift_segment", "past_the_end", "no_segment", "miscount", "misname", "take_back",
              "broken_tag", "contradict")
QA_FAULT_SHARE = 0.06   # of the rows
COT_FAULT_SHARE = 0.22  # the paper's RL and SFT sets are as 22 to 76


# ---------------------------------------------------------------------------------- the judge
def judge(row, events):
    """[QA valid] and [CoT valid]: which set a row belongs to, and what is wrong with it. The truth
    is rebuilt from the events: every question that the clip can answer, with answer and chain."""
    answer, cot = all_questions(events).get(row["question"], (None, None))
    choices = row["multi_choice"]
    if not answer:
        return "discarded", "the question has no known form, or no answer in this clip"
    if len(set(choices)) != 4 or answer not in choices:
        return "discarded", f"not four different choices with the truth, {answer}"
    if row["answer"] != answer:
        return "discarded", f"the answer is {row['answer']}, the truth {answer}"
    if row["cot"] != cot:
        return "rl", f"the chain is not the true one, {cot}"
    return "sft", ""


# ---------------------------------------------------------------------------------- the pipeline
def make_clips(settings, split, n_clips, sounds):
    """Write the WAV files of a split; returns A1 to A5 of each clip."""
    clips = []
    for i in tqdm(range(n_clips), f"{split} clips"):
        rng = np.random.default_rng([settings.seed, ("train", "test").index(split), i])
        samples, events = synthesise(rng, sounds)
        path = f"audio/{split}/{i:05d}.wav"
        write_atomically(Path(settings.out) / path, wav_bytes(samples))
        kinds = ", ".join(f"a {e['kind']}" for e in events)
        clips.append({"id": f"{split}-{i:05d}", "audio_path": path,
                      "A1_description": f"A recording with {kinds}.", "A2_speech": "none",
                      "A3_music": "none", "A4_events": events, "A5_duration_s": CLIP_S})
    return clips


def make_rows(clips, kinds, seed, qa_faults=0.0, cot_faults=0.0):
    """A row of each category for each clip, and the fault planted in it: [(row, clip, fault)]."""
    rows = []
    for i, clip in enumerate(clips):
        for k, category in enumerate(QUESTIONS):
            rng = np.random.default_rng([*seed, i, k])
            row = {"id": f"{clip['id']}-{category}", "audio_path": clip["audio_path"],
                   **write_row(category, clip["A4_events"], rng, kinds), "category": category}
            draw, fault = rng.random(), "intact"
            if draw < qa_faults:
                fault = str(rng.choice(QA_FAULTS))
                row |= break_qa(fault, row, clip["A4_events"], kinds, rng)
            elif draw < qa_faults + cot_faults:
                fault = str(rng.choice(COT_FAULTS))
                row |= break_chain(fault, row, kinds, rng)
            rows.append((row, clip, fault))
    return rows


def without(row, *keys):
    return {k: v for k, v in row.items() if k not in keys}


def run():
    settings, sounds = parse_settings(Settings, __doc__), (None, None)
    if settings.sounds:
        sounds = read_sounds(settings.sounds, settings.hold_out, settings.seed)
    kinds, seed = sorted(sounds[0] or SYNTHETIC), settings.seed
    clips = make_clips(settings, "train", settings.train_clips, sounds[0])
    test_clips = make_clips(settings, "test", settings.test_clips, sounds[1])
    test = [without(row, "cot") for row, _, _ in make_rows(test_clips, kinds, [seed, 3])]
    sets, verdicts = {"sft": [], "rl": [], "discarded": []}, Counter()
    for row, clip, fault in make_rows(clips, kinds, [seed, 2], QA_FAULT_SHARE, COT_FAULT_SHARE):
        verdict, wrong = judge(row, clip["A4_events"])
        row = without(row, "category", "cot" if verdict == "rl" else "")
        sets[verdict].append(row | {"reason": wrong} if verdict == "discarded" else row)
        verdicts[fault, verdict] += 1
    for name, items in {"clips": clips, **sets, "test": test}.items():
        write_atomically(Path(settings.out) / f"{name}.jsonl", json_lines(items))
    print(f"\n{'planted':<18}" + "".join(f"{'-> ' + verdict:>14}" for verdict in sets))
    for fault in ("intact", *QA_FAULTS, *COT_FAULTS):
        print(f"{fault:<18}" + "".join(f"{verdicts[fault, verdict]:>14}" for verdict in sets))
    print(f"\ntest: {len(test)} questions on {len(test_clips)} clips of their own. A row:\n"
          f"{json.dumps(sets['sft'][0], indent=2)}")


# ==================================================================================================
# From here on: reading and writing, the toy's data and your own.

def wav_bytes(samples):
    """(N,) float samples in [-1, 1] as the bytes of a 16-bit mono WAV file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.asarray(samples) * 32767).round().astype("<i2").tobytes())
    return data.getvalue()


def read_wav(path, data):
    """A WAV file's bytes, 8 to 32-bit integer or float PCM -> (N, channels) float32, rate in Hz;
    None for another coding."""
    chunks, at = {}, 12
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at:at + 8])
        left = len(data) - at - 8
        if name == b"data" and (size == 0 or size >= 0x7FFF_0000):  # a stream, never closed
            size = left
        if name == b"data" and left < size:
            raise EchoError(f"{path}: broken WAV, {left} of {size} bytes of audio are there")
        chunks.setdefault(name, data[at + 8:at + 8 + size])
        at += 8 + size + size % 2
    header, audio = chunks.get(b"fmt ", b""), chunks.get(b"data")
    if len(header) < 16 or audio is None:
        raise EchoError(f"{path}: broken WAV, no 'fmt ' or no 'data' chunk")
    coding, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == 0xFFFE and len(header) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the coding follows
        coding = struct.unpack("<H", header[24:26])[0]
    if (coding, bits) not in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32)):
        return None
    width = bits // 8
    if not channels or frame != channels * width or not 1000 <= rate <= 768_000:
        raise EchoError(f"{path}: broken WAV, {channels} channels of {bits} bits in frames of "
                        f"{frame} bytes at {rate} Hz")
    if len(audio) > 3600 * frame * rate:
        raise EchoError(f"{path}: {len(audio) / frame / rate:.0f} s long; needed: at most an hour")
    raw = np.frombuffer(audio[:len(audio) // frame * frame], np.uint8)
    if coding == 3:
        return raw.view("<f4").reshape(-1, channels), rate
    left_aligned = np.zeros((len(raw) // width, 4), np.uint8)  # in 32 bits
    left_aligned[:, 4 - width:] = raw.reshape(-1, width) ^ (128 if bits == 8 else 0)
    samples = left_aligned.view("<i4").astype(np.float32) / 2 ** 31
    return samples.reshape(-1, channels), rate


def load_audio(path):
    """A clip as a mono waveform, (N,) float32 at 16 kHz; formats but WAV need torchcodec."""
    data, read = Path(path).read_bytes(), None
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        read = read_wav(path, data)
    if not read:
        try:
            samples, rate = torchaudio.load(path)
            read = samples.T.numpy(), rate
        except Exception as error:
            reason = "not a WAV file of 8 to 32-bit PCM; pip install torchcodec reads more"
            if not isinstance(error, ImportError):
                reason = first_line(error)
            raise EchoError(f"{path}: can't be read ({reason}); or convert it: ffmpeg -i "
                            f"'{Path(path).name}' '{Path(path).stem}-16k.wav'") from None
    samples, rate = read
    if not samples.size:
        raise EchoError(f"{path}: the clip is empty, it holds no samples")
    if not np.abs(samples).max() <= 1e4:
        raise EchoError(f"{path}: samples are NaN or beyond 10,000; export it again")
    if rate // math.gcd(rate, SAMPLE_RATE) > 12_000:  # the filter would take gigabytes
        raise EchoError(f"{path}: a sample rate of {rate} Hz; convert it to {SAMPLE_RATE} first")
    mono = torch.from_numpy(samples.mean(1, dtype=np.float32))
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE)


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path, needs=()):
    """Rows of a JSON list or of JSON lines, each a dict with text under the keys `needs`."""
    number = 0
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                rows += [json.loads(line)] if line.strip() else []
        for number, row in enumerate(rows, 1):
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair can't be written
    except (ValueError, RecursionError) as error:  # of UTF-8, too
        raise EchoError(f"{path}, row {number}: not UTF-8 or not JSON ({error}); needed: a list of "
                        "objects, or an object a line") from None
    if not rows:
        raise EchoError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        for key in needs:
            if not isinstance(row, dict) or not row.get(key) or not isinstance(row[key], str):
                raise EchoError(f"{path}, row {number}: no text under {key!r}; needed: "
                                f"{', '.join(needs)}")
    return rows


@dataclass
class Question:
    """A row as published: the native one, MMAR's (choices) or MMAU's (audio_id, choices)."""
    row: dict
    path: Path
    question: str
    choices: list
    answer: str | None
    category: str


def read_questions(path, audio_root="", needs=("answer",)):
    """Questions of a data file. Audio paths are relative to `audio_root`, or the file's folder.
    needs: what a row must have beside question and choices; for training also its clip."""
    questions = []
    for number, row in enumerate(read_rows(path, ("question", *needs)), 1):
        answer, audio = row.get("answer"), row.get("audio_path") or row.get("audio_id")
        choices, wrong = row.get("multi_choice") or row.get("choices"), None
        if not isinstance(audio, str):
            wrong = "no 'audio_path' (or 'audio_id')"
        elif not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            wrong = "no 'multi_choice' (or 'choices'), a list of texts"
        elif not isinstance(answer, str | None):
            wrong = f"'answer' is not a text: {answer!r}"
        elif needs and not any(same_answer(answer, c) for c in choices):
            wrong = f"the answer {answer!r} is not among the choices"
        clip = Path(audio_root or Path(path).parent) / str(audio)
        if not wrong and needs and not clip.is_file():
            wrong = f"no such file: {clip}"
        if wrong:
            raise EchoError(f"{path}, row {number}: {wrong}")
        category = str(row.get("category") or row.get("task") or "all")
        questions.append(Question(row, clip, row["question"], choices, answer, category))
    return questions


if __name__ == "__main__":
    main(run)
