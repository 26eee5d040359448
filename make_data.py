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
import contextlib
import io
import json
import math
import os
import re
import sqlite3
import struct
import unicodedata
import wave
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchaudio
from tqdm import tqdm

from echo import (SAMPLE_RATE, EchoError, find_choice, is_right, main, parse_segment,
                  parse_settings, processes, refuse, split_segments)

SYNTHETIC = ("hum", "rumble", "buzz", "tone", "chirp", "bell", "whistle", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # pulses in a sound: the detail
QUESTIONS = {"count": "How many pulses has the {}?",
             "order": "Which sound comes right after the {}?",
             "count_after": "How many pulses has the sound right after the {}?",
             "find": "How many pulses has the sound right after the {}?"}  # the fast hum
SPEEDS = {2: "slow", 3: "slow", 4: "fast", 5: "fast", 6: "fast"}
MAX_CLIP_S = 3600  # a longer file is refused before its samples are decoded
CELL_S = 0.5  # of the thumbnail: it says in which cells a sound is, not how many pulses it has


@dataclass
class Settings:
    out: str = "data"         # folder to write
    train_clips: int = 1200   # one row of each category per clip
    test_clips: int = 200
    clip_s: float = 6.0       # length of a clip, in whole cells of half a second
    seed: int = 0             # same seed, same bytes
    loose: float = 0.6        # share of the annotations that end half a second too early
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
    recording = recording - recording.mean()
    if np.abs(recording).max() < 1e-3:
        raise EchoError(f"{path}: silent, its samples stay within a thousandth of full scale")
    recording = np.resize(recording, max(len(recording), SAMPLE_RATE))  # a short one, repeated
    loudness = np.sqrt(np.convolve(recording ** 2, np.ones(n) / n, mode="same") + 1e-12)
    audible = loudness > 0.03 * loudness.max()
    return (recording / loudness)[audible]


def read_sounds(folder):
    """Recordings by kind, {kind: [(N,), ...]}. A kind's name is its folder's, in any script. What
    a system put there (._x, @eaDir, __MACOSX) is left out."""
    sounds, hidden = {}, (".", "@", "__")
    paths = [p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(hidden)]
    for path in tqdm(sorted(paths), "recordings"):
        name = unicodedata.normalize("NFC", path.name).lower()
        kind = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in name)
        kind = "-".join(kind.split())  # letters, their marks and numbers
        inside = sorted(p for p in path.iterdir() if not p.name.startswith(hidden))
        files = [p for p in inside if p.suffix.lower() == ".wav"]
        if len(files) < len(inside):
            print(f"{path}: {len(inside) - len(files)} that are no .wav files are left out")
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
    """The sounds of a clip, [(kind, start_s, end_s), ...], 0.8 to 1.5 s long. One kind comes one to
    three times, never twice in a row, and each time something follows it. Two thirds of the clips
    have few sounds and a gap of over a second; in all of them a seventh of the sounds touch."""
    searched, *others = map(str, rng.permutation(kinds))
    few = rng.random() < 0.65
    n_searched = int(rng.choice([1, 2] if few else [1, 2, 2, 3, 3]))
    n_others = max(n_searched, 2 if few else rng.integers(2, 4))  # in 6 s
    n = round(clip_s / 6 * (n_searched + n_others))
    rest = others[2:] * n  # in a long clip some come again
    order = ([searched] * n_searched + others[:2] + rest)[:n]
    while order[-1] == searched or any(a == b for a, b in zip(order, order[1:])):
        order = [order[i] for i in rng.permutation(len(order))]
    if few:
        length_s = rng.uniform(0.8, 1.1, n)
        spare_s = clip_s - length_s.sum() - 1.0
        gap_s = rng.dirichlet([1] * (n + 1))[:n] * spare_s / 2
    else:
        spare_s = rng.dirichlet([1] * (2 * n + 1)) * (clip_s - 0.9 * n)
        length_s = 0.8 + np.minimum(spare_s[:n], 0.7)
        gap_s = 0.1 + spare_s[n:-1]
    gap_s[rng.random(n) < 0.15] = 0.0
    if few:
        gap_s[rng.integers(1, n)] = rng.uniform(1.0, clip_s - length_s.sum() - gap_s.sum())
    end_s = np.cumsum(gap_s + length_s)
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
        clip[a:b] += level * sound * pulse_train(pulses, b - a, rng.choice([0.0001, 0.004, 0.012]))
        events.append({"kind": kind, "start_s": start_s, "end_s": end_s, "pulses": pulses})
    if rng.random() < 0.5:  # half the rooms have an echo
        late = int(rng.uniform(0.03, 0.15) * SAMPLE_RATE)
        clip[late:] += 10 ** (rng.uniform(-20, -8) / 20) * clip[:-late]
    return np.clip(clip, -1, 1), events


def segment_of(event):
    """The cells that hold over 0.03 s of a sound's pulses, (start_s, end_s): what a thumbnail can
    know of its place."""
    edge_s = 0.2 * (event["end_s"] - event["start_s"]) / event["pulses"] + 0.03  # see from_edge
    return (math.floor((event["start_s"] + edge_s) / CELL_S) * CELL_S,
            math.ceil((event["end_s"] - edge_s) / CELL_S) * CELL_S)


def annotate(events, loose, rng):
    """A4 as language models write it: the end of a sound is rough. A share `loose` of the ends, of
    sounds of two cells or more, comes one cell too early."""
    for e in events:
        early = rng.random() < loose and segment_of(e)[1] - segment_of(e)[0] > CELL_S
        e["annotated_end_s"] = segment_of(e)[1] - CELL_S * early


def exact(events):
    """The same events without annotations: their tags are exact."""
    return [{k: v for k, v in e.items() if k != "annotated_end_s"} for e in events]


def tag_of(event):
    """What a chain's tag says of a sound: its place as it is annotated."""
    start_s, end_s = segment_of(event)
    return start_s, event.get("annotated_end_s", end_s)


def point_to(event, lead="Right after it"):
    """A sentence that points to a sound, and says what is heard there."""
    start_s, end_s = tag_of(event)
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
                         "gap_s": target["start_s"] - event["end_s"], "listen_to": looks})
    return rows


def pick(category, events, rng):
    """A question of a category: to find, among as many sounds as there are; and over a gap of more
    than a second, if there is one."""
    rows = [row for row in questions_about(events) if row["category"] == category]
    hardest = max((row["candidates"], row["gap_s"] > 1) for row in rows)
    return rng.choice([row for row in rows if (row["candidates"], row["gap_s"] > 1) == hardest])


def write_row(category, events, rng, kinds=SYNTHETIC):
    """A question of a category about a clip, and four choices; keys as in published rows."""
    true = pick(category, events, rng)
    pool = kinds if category == "order" else NUMBERS.values()
    wrong = [x for x in pool if x not in (true["answer"], true["name"])]
    choices = rng.permutation([true["answer"], *rng.choice(wrong, 3, replace=False)])
    return {"question": true["question"], "multi_choice": list(map(str, choices)),
            **{k: true[k] for k in ("answer", "cot", "listen_to", "category")}}


QA_FAULT_SHARE = 0.06   # of the rows
COT_FAULT_SHARE = 0.11  # of the looks: the paper's RL and SFT sets are as 22 to 76


def faulty(row, kinds, rng):
    """A row with each fault that it can have: {fault: row}, those of the question, of the chain."""
    answer, cot, first = row["answer"], row["cot"], row["listen_to"][0]
    absent = max(kinds) + "s"  # no kind: it would be the last
    other = str(rng.choice([choice for choice in row["multi_choice"] if choice != answer]))
    start_s, end_s = tag_of(first)
    tag, said = f"<seg>{start_s:.1f}", f"the {first['kind']} has {NUMBERS[first['pulses']]}"
    number = rng.choice([word for n, word in NUMBERS.items() if n != first["pulses"]])
    choices = [absent if choice == answer else choice for choice in row["multi_choice"]]
    question = row["question"].replace(f"{first['kind']}?", f"{absent}?")
    chains = {"shift_segment": cot.replace(tag, f"<seg>{abs(start_s - 0.5):.1f}", 1),
              "no_segment": cot.replace(f"{tag}, {end_s:.1f}</seg> ", "", 1),
              "miscount": cot.replace(said, f"the {first['kind']} has {number}", 1),
              "misname": cot.replace(said, said.replace(first["kind"], absent), 1),
              "contradict": cot.replace(f"<answer>{answer}", f"<answer>{other}")}
    qa = {"wrong_answer": {"answer": other}, "lost_choice": {"multi_choice": choices},
          "absent_sound": {"question": question}}
    return ({fault: row | change for fault, change in qa.items()},
            {fault: row | {"cot": chain} for fault, chain in chains.items()})


def plant(row, kinds, rng):
    """Break a known share of the rows. Returns the row, and the fault's name."""
    qa, chains = faulty(row, kinds, rng)
    rows, draw = {"intact": row}, rng.random()
    if draw < QA_FAULT_SHARE:
        rows = qa
    elif draw < QA_FAULT_SHARE + COT_FAULT_SHARE * len(row["listen_to"]):
        rows = chains
    fault = str(rng.choice(list(rows)))
    return rows[fault], fault


END = re.compile(r", (\d+\.\d)</seg>")


def grounded(cot, truth):
    """Is this the true chain, but for ends that are a cell too early at most?"""
    early_s = [float(t) - float(s) for s, t in zip(END.findall(cot), END.findall(truth))]
    return END.sub("", cot) == END.sub("", truth) and all(0 <= s <= CELL_S for s in early_s)


def judge(row, events):
    """[QA valid] and [CoT valid]: which set a row belongs to, and what is wrong with it. The truth
    is rebuilt from the events: every question that the clip can answer, with answer and chain."""
    asked = {true["question"]: true for true in questions_about(exact(events))}
    truth = asked.get(row["question"])
    if not truth:
        return "discarded", "the question has no known form, or no answer in this clip"
    if len(set(row["multi_choice"])) != 4 or truth["answer"] not in row["multi_choice"]:
        return "discarded", f"not four different choices with the truth, {truth['answer']}"
    if row["answer"] != truth["answer"]:
        return "discarded", f"the answer is {row['answer']}, the truth {truth['answer']}"
    if not grounded(row["cot"], truth["cot"]):
        return "rl", "the chain is not the true one"
    return "sft", ""


def make_clip(settings, split, i, recordings, kinds):
    """Write the WAV file of a clip; its A1 to A5, a row of each category, and its generator."""
    rng = np.random.default_rng([settings.seed, split == "test", i])
    samples, events = synthesise(rng, recordings, settings.clip_s)
    annotate(events, settings.loose, rng)
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
    with lock(settings.out):
        make(settings)


def make(settings):
    folders = [Path(folder).resolve() for folder in (settings.sounds, settings.out)]
    if settings.sounds and any(f in (g, *g.parents) for f, g in (folders, folders[::-1])):
        raise EchoError(f"--sounds {settings.sounds}, --out {settings.out}: one lies in the other; "
                        "give another --out")
    if not 6 <= settings.clip_s <= 30 or settings.clip_s % CELL_S or settings.loose > 1:
        raise EchoError(f"--clip-s {settings.clip_s} --loose {settings.loose}: needed: 6 to 30, in "
                        "whole half seconds, and a share, 0 to 1")
    sounds = read_sounds(settings.sounds) if settings.sounds else None
    kinds = sorted(sounds or SYNTHETIC)
    clips, test, verdicts = [], [], Counter()
    sets = {"sft": [], "rl": [], "discarded": []}
    for name in ("clips", *sets, "test"):  # if this run is killed: no old rows beside new audio
        (Path(settings.out) / f"{name}.jsonl").unlink(missing_ok=True)
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

@contextlib.contextmanager
def lock(folder):
    """Hold a folder as its only writer; of several processes that train together the first does.
    SQLite's lock ends with the process, even a killed one."""
    if processes()[0] > 0:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        held = sqlite3.connect(Path(folder) / ".lock", timeout=0, isolation_level=None)
        held.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        raise EchoError(f"{folder}: another run is writing there, or it can't be written ({error});"
                        " wait for it, or give another --out") from None
    with contextlib.closing(held):
        yield


def write_atomically(path, data):
    """Write text or bytes: whole or not at all."""
    path = Path(path).resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise EchoError(f"{path}: not a file; give another path")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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


def advice(path):
    return ('; get it again, or convert or cut it: '
            f'ffmpeg -i "{path.name}" -ar 16000 "{path.stem}-16k.wav"')


def wav_chunks(path):
    """The chunks of a WAV file, {name: bytes}, the first of each name."""
    data, chunks, at = path.read_bytes(), {}, 12
    if data[:4] != b"RIFF":
        raise EchoError(f"{path}: not a WAV file, it begins with {data[:8]!r}{advice(path)}")
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at:at + 8])
        left = len(data) - at - 8
        if name == b"data" and (size == 0 or size >= 0x7FFF_0000):
            size = stream_size(data[at + 8:])
        if name == b"data" and (left < size or name in chunks):
            raise EchoError(f"{path}: broken WAV, {left} of {size} bytes of audio are there, or it "
                            "has two parts; export or copy it again")
        chunks.setdefault(name, data[at + 8:at + 8 + size])
        at += 8 + size + size % 2
    return chunks


def stream_size(data):
    """How many bytes of a stream are audio, whose header was never given its size: all before the
    chunks, if any, that fill the rest of the file."""
    for match in re.finditer(rb"LIST|bext|iXML|cue |smpl|fact|JUNK|PEAK|id3 |ID3 |_PMX", data):
        at = match.start()
        while at + 8 <= len(data):
            size = struct.unpack("<I", data[at + 4:at + 8])[0]
            at += 8 + size + size % 2
        if at in (len(data), len(data) + 1):
            return match.start()
    return len(data)


def read_wav(path):
    """A WAV file, 8 to 32-bit integer or 32-bit float PCM -> (N, channels) float32, rate in Hz."""
    path, chunks = Path(path), wav_chunks(path)
    header, audio = chunks.get(b"fmt ", b"").ljust(26, b"\0"), chunks.get(b"data", b"")
    coding, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the coding follows
        coding = struct.unpack("<H", header[24:26])[0]
    width, shared = bits // 8, math.gcd(rate, SAMPLE_RATE)
    known = (coding, bits) in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32))
    filter_size = rate * SAMPLE_RATE / max(1, shared) ** 2  # that of the resampling
    refuse(path, {
        "not a WAV file, or without audio": not {b"fmt ", b"data"} <= chunks.keys(),
        f"coding {coding} with {bits} bits, not PCM with 8, 16, 24 or 32": not known,
        f"{channels} channels in frames of {frame} bytes": frame != channels * width or not frame,
        f"{rate} Hz can't be resampled": not 1000 <= rate <= 768_000 or filter_size > 4e6,
        f"longer than {MAX_CLIP_S} s": len(audio) > MAX_CLIP_S * rate * frame,
    }, advice(path))
    raw = np.frombuffer(audio[:len(audio) // frame * frame], np.uint8)
    if coding == 3:
        return raw.view("<f4").reshape(-1, channels), rate
    left_aligned = np.zeros((len(raw) // width, 4), np.uint8)  # in 32 bits
    left_aligned[:, 4 - width:] = raw.reshape(-1, width) ^ (128 if bits == 8 else 0)
    samples = left_aligned.view("<i4").astype(np.float32) / 2 ** 31
    return samples.reshape(-1, channels), rate


def load_audio(path):
    """A WAV file as a mono waveform, (N,) float32 at 16 kHz."""
    try:
        samples, rate = read_wav(path)
    except ValueError as error:  # a NUL in its name
        raise EchoError(f"{str(path)!r}: {error}") from None
    mono = samples.mean(1, dtype=np.float32)
    refuse(path, {"empty": not samples.size}, "; export it again")
    power = np.square(samples, dtype=np.float64).mean()
    refuse(path, {
        "float samples that are NaN or far beyond -1 to 1": not np.abs(samples).max() <= 16,
        "its channels cancel each other out":
            np.square(mono, dtype=np.float64).mean() < 1e-4 * power,
    }, "; export it again")
    return torchaudio.functional.resample(torch.from_numpy(mono), rate, SAMPLE_RATE)


def read_rows(path, needs=()):
    """Rows of a JSON list or of JSON lines, each a dict with text under the keys `needs`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            lines = [line for line in text.split("\n") if line.strip()]
            text = "[" + ",\n".join(lines) + "]"
        rows = json.loads(text)
        json.dumps(rows, ensure_ascii=False).encode()  # half a surrogate pair can't be written
    except OSError as error:
        raise EchoError(f"{path}: {error.strerror}; give another file, or run make_data.py for the "
                        "toy's") from None
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


# problem: what is wrong with a row, if it can't be answered
Question = namedtuple("Question", "row path question choices answer category listen_to problem",
                      defaults=[None])


def name_of(q):
    """How messages call a row."""
    return q.row.get("id") or q.path


def as_text(value):
    """A choice or an answer as text: JSON's numbers and booleans as JSON writes them."""
    return json.dumps(value) if isinstance(value, (bool, int, float)) else value


def sounds_of(row):
    """The toy's `listen_to`, the sounds that the true chain listens to; () in any other row."""
    events = row.get("listen_to")
    good = isinstance(events, list) and all(
        isinstance(e, dict) and isinstance(e.get("start_s"), (int, float))
        and isinstance(e.get("end_s"), (int, float)) and 0 <= e["start_s"] < e["end_s"] < 1e9
        and e.get("pulses") in tuple(NUMBERS) for e in events)
    return events if good else ()


def read_questions(path, audio_root="", needs=("answer",)):
    """Questions of a data file, its rows native, MMAR's (choices) or MMAU's (audio_id, choices).
    Audio paths are relative to `audio_root`, or the file's folder. needs: what a row must have
    beside question and choices, for training; else a row may have a `problem`, and an answer that
    is no choice becomes None."""
    questions, texts = [], [key for key in needs if key != "answer"]
    for number, row in enumerate(read_rows(path, ("question", *texts)), 1):
        where = f"{path}, row {number}"
        audio = row.get("audio_path") or row.get("audio_id")
        choices = row.get("multi_choice") or row.get("choices")
        listed = isinstance(choices, list) and all(isinstance(as_text(c), str) for c in choices)
        problem = None
        if not isinstance(audio, str) or not listed:
            problem = (f"{where}: needed: 'audio_path' (or 'audio_id'), a text, and 'multi_choice' "
                       f"(or 'choices'), a list of texts or numbers, not {str(choices)[:80]}")
            if needs:
                raise EchoError(problem)
            audio = ""
            choices = []
        choices = [as_text(choice) for choice in choices]
        said = as_text(row.get("answer"))
        answer = find_choice(said, choices) if isinstance(said, str) else None
        if needs and not answer:
            raise EchoError(f"{where}: the answer {row.get('answer')!r} is not one of the choices")
        clip = Path(audio_root or Path(path).parent) / audio
        if needs and ("\0" in audio or not clip.is_file()):
            raise EchoError(f"{where}: no such file: {str(clip)!r}")
        category = row.get("category") or row.get("task") or "all"
        category = ", ".join(map(str, category if isinstance(category, list) else [category]))
        questions.append(Question(row, clip, row["question"], choices, answer, category,
                                  sounds_of(row), problem))
    return questions


def check_rows(questions):
    """Before a training: read every clip once, since a broken one would end it in the middle; and
    count the chains that give another answer than their row, or point to nothing that can be heard.
    """
    seconds, odd = {}, []
    for path in tqdm(sorted({q.path for q in questions}), "checking clips", leave=False,
                     disable=processes()[0] > 0):
        seconds[path] = len(load_audio(path)) / SAMPLE_RATE
    for q in questions:
        chain = str(q.row.get("cot") or "")
        tags = [parse_segment(tag, seconds[q.path]) for _, tag in split_segments(chain)[0]]
        heard = tags and not any(segment.refused for segment in tags)
        if chain and not (heard and is_right(chain, q)):
            odd.append(q)
    if odd and processes()[0] == 0:
        print(f"{len(odd)} of {len(questions)} chains give another answer than their row, or point "
              f"to nothing that can be heard; the first: {name_of(odd[0])}")


if __name__ == "__main__":
    main(run)
