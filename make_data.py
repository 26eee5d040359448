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
import io
import json
import re
import wave
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echo import EchoError, load_audio, main, parse_segment, parse_settings, write_atomically

SYNTHETIC = ("hum", "rumble", "buzz", "tone", "chirp", "bell", "whistle", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # pulses in a sound: the detail
CATEGORIES = ("count", "order", "count_after")


@dataclass
class Settings:
    out: str = "data"         # folder to write
    train_clips: int = 2400   # one row of each category per clip
    test_clips: int = 200
    seed: int = 0             # same seed, same bytes
    sounds: str = ""          # a folder with a folder of WAV files for each kind, five or more
    hold_out: float = 0.0     # share of each kind's recordings that the test clips alone have
    qa_faults: float = 0.06   # share of rows whose question or answer is broken on purpose
    cot_faults: float = 0.22  # share of rows with a broken chain (the paper's RL : SFT is 22 : 76)


SAMPLE_RATE = 16_000
CLIP_S = 6.0
SOUND_S = 1.0  # every sound lasts one second ...
GRID_S = 0.5   # ... and starts on this grid, also the thumbnail's: it says where, not how many


# ---------------------------------------------------------------------------------- sounds

def wav_bytes(samples, sample_rate=SAMPLE_RATE):
    """(N,) float samples in [-1, 1] as the bytes of a 16-bit mono WAV file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.asarray(samples) * 32767).round().astype("<i2").tobytes())
    return data.getvalue()


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


def steady(recording):
    """A recording without its pauses and at one loudness over 50 ms, so that its own rise and fall
    is not taken for pulses."""
    n = SAMPLE_RATE // 20
    recording = np.resize(recording, max(len(recording), SAMPLE_RATE))  # a short one, repeated
    loudness = np.sqrt(np.convolve(recording ** 2, np.ones(n) / n, mode="same") + 1e-12)
    audible = loudness > 0.03 * loudness.max()
    return (recording / loudness)[audible]


def read_sounds(folder, hold_out, seed):
    """Recordings by kind for training and for the test: {kind: [(N,), ...]} twice."""
    train, test = {}, {}
    folders = sorted(p for p in Path(folder).glob("*") if p.is_dir())
    if len(folders) < 5:
        raise EchoError(f"--sounds {folder}: {len(folders)} folders; needed: one for each kind of "
                        "sound, five or more")
    for path in tqdm(folders, desc="recordings"):
        kind = re.sub("[^a-z0-9]+", "-", path.name.lower()).strip("-")
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".wav")
        if kind in train or not kind or len(files) < 1 + (hold_out > 0):
            raise EchoError(f"{path}: {len(files)} WAV files for kind {kind!r}; needed: at least "
                            f"{1 + (hold_out > 0)}, and a name that no other folder has")
        recordings = [steady(load_audio(p, SAMPLE_RATE).numpy()) for p in files]
        order = np.random.default_rng([seed, len(train)]).permutation(len(files))
        n = min(max(1, round(hold_out * len(files))), len(files) - 1) if hold_out else 0
        train[kind] = [recordings[i] for i in order[n:]]
        test[kind] = [recordings[i] for i in order[:n]] if n else train[kind]
    return train, test


def from_edge(n_pulses, t):
    """How far inside a pulse time `t` (0 to 1 over the sound) lies, in periods; else negative."""
    return 0.3 - abs(t * n_pulses % 1.0 - 0.5)


def pulse_train(n_pulses, n_samples, ramp_s=0.004):
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
        start_s, pulses = float((gaps[i] + i * per_sound) * GRID_S), int(rng.choice(list(NUMBERS)))
        a = round(start_s * SAMPLE_RATE)
        b = a + round(SOUND_S * SAMPLE_RATE)
        if sounds:
            recording = sounds[kind][rng.integers(len(sounds[kind]))]
            sound = np.resize(np.roll(recording, -rng.integers(len(recording))), b - a)
        else:
            sound = carrier(kind, t[a:b], rng)
        level = 10 ** (rng.uniform(-22, -14) / 20)
        clip[a:b] += level * sound * pulse_train(pulses, b - a, rng.choice([0.001, 0.004, 0.012]))
        events.append({"kind": kind, "start_s": start_s, "end_s": start_s + SOUND_S,
                       "pulses": pulses})
    return np.clip(clip, -1, 1), events


def describe(events):
    """A1..A5 of a clip."""
    *names, last = (f"a {e['kind']}" for e in events)
    return {"A1_description": f"A recording with {', '.join(names)} and {last}.",
            "A2_speech": "none", "A3_music": "none", "A4_events": events, "A5_duration_s": CLIP_S}


# ---------------------------------------------------------------------------------- QA + CoT

def look_for(event):
    """The sentence that points at a sound, and says what is heard there."""
    return f"I look for the {event['kind']} {heard(event)}"


def then_comes(event):
    return f"Right after it {heard(event)}"


def heard(event):
    return (f"<seg>{event['start_s']:.1f}, {event['end_s']:.1f}</seg> "
            f"the {event['kind']} has {NUMBERS[event['pulses']]} pulses.")


STEP = re.compile(r"(?:I look for the (\S+)|Right after it) <seg>([^<]*)</seg>"
                  r" the (\S+) has (\w+) pulses\.")


def write_row(category, events, rng, kinds=SYNTHETIC):
    """Question, four choices, answer and grounded chain for a clip; keys as in published rows."""
    i = int(rng.integers(len(events) - (category != "count")))
    event, after = events[i], events[min(i + 1, len(events) - 1)]
    kind = event["kind"]
    question, answer = {
        "count": (f"How many pulses has the {kind}?", NUMBERS[event["pulses"]]),
        "order": (f"Which sound comes right after the {kind}?", after["kind"]),
        "count_after": (f"How many pulses has the sound right after the {kind}?",
                        NUMBERS[after["pulses"]]),
    }[category]
    pool = kinds if category == "order" else NUMBERS.values()
    wrong = rng.choice([x for x in pool if x not in (answer, kind)], 3, replace=False)
    choices = [str(c) for c in rng.permutation([answer, *wrong])]
    steps = look_for(event) if category == "count" else f"{look_for(event)} {then_comes(after)}"
    cot = f"<think>{steps}</think><answer>{answer}</answer>"
    return {"question": question, "multi_choice": choices, "answer": answer, "cot": cot}


# ---------------------------------------------------------------------------------- planted faults
# Called with (row, events, kinds, rng); returned are the keys of the row that change.

def other(rng, pool, *but):
    return str(rng.choice([x for x in pool if x not in but]))


def break_qa(fault, row, events, kinds, rng):
    answer, choices = row["answer"], row["multi_choice"]
    if fault == "absent_sound":
        kind = other(rng, kinds, *(e["kind"] for e in events))
        return {"question": re.sub(r"the (\S+)\?", f"the {kind}?", row["question"])}
    if fault == "lost_choice":
        pool = NUMBERS.values() if answer in NUMBERS.values() else [*kinds, "siren"]
        wrong = other(rng, pool, *choices)
        return {"multi_choice": [wrong if c == answer else c for c in choices]}
    wrong = other(rng, choices, answer)
    if fault == "double_choice":
        return {"multi_choice": [answer if c == wrong else c for c in choices]}
    # wrong_answer: the chain's last word is wrong in the same way
    return {"answer": wrong, "cot": row["cot"].replace(f"<answer>{answer}<", f"<answer>{wrong}<")}


EDITS = {  # a pattern in the chain -> what takes the place of its first match
    "take_back": ("</think>", " Really it has nine pulses.</think>"),
    "embellish": (" <seg>", ", which has nine pulses, <seg>"),
    "past_the_end": (r", [\d.]+</seg>", ", 7.5</seg>"),
    "reversed_segment": (r"<seg>([\d.]+), ([\d.]+)", r"<seg>\2, \1"),
    "no_segment": ("<seg>.*?</seg> ", ""),  # every match
    "broken_tag": ("</think>", "")}


def break_chain(fault, row, events, kinds, rng):
    cot = row["cot"]
    if fault in EDITS:
        return {"cot": re.sub(*EDITS[fault], cot, count=0 if fault == "no_segment" else 1)}
    if fault == "shift_segment":
        s, e = map(float, re.search("<seg>(.*?), (.*?)</seg>", cot).groups())
        shift = 0.5 if s == 0 or e < CLIP_S and rng.random() < 0.5 else -0.5
        shifted = f"<seg>{s + shift:.1f}, {e + shift:.1f}</seg>"
        return {"cot": re.sub("<seg>.*?</seg>", shifted, cot, count=1)}
    pattern, pool = {"miscount": (r"has (\w+) pulses", NUMBERS.values()),
                     "misname": (r"</seg> the (\S+)", kinds),
                     "contradict": ("<answer>(.+)</answer>", row["multi_choice"])}[fault]
    said = re.search(pattern, cot)
    return {"cot": cot[:said.start(1)] + other(rng, pool, said[1]) + cot[said.end(1):]}


QA_FAULTS = {name: partial(break_qa, name) for name in (
    "wrong_answer", "absent_sound", "lost_choice", "double_choice")}
COT_FAULTS = {name: partial(break_chain, name) for name in (
    "shift_segment", "miscount", "misname", "contradict", *EDITS)}


# ---------------------------------------------------------------------------------- the judge

def judge_qa(row, events):
    """[QA valid]: None, or what is wrong with question, choices or answer given the true events."""
    match = re.fullmatch(r"(How many pulses has|Which sound comes|How many pulses has the sound) ?"
                         r"(right after )?the (\S+)\?", row["question"])
    if not match:
        return "the question has no known form"
    kinds = [e["kind"] for e in events]
    if kinds.count(match[3]) != 1:
        return f"the clip does not hold exactly one {match[3]}"
    i = kinds.index(match[3]) + bool(match[2])
    if i == len(events):
        return f"nothing comes after the {match[3]}"
    truth = kinds[i] if match[1].startswith("Which") else NUMBERS[events[i]["pulses"]]
    if len(row["multi_choice"]) != 4 or len(set(row["multi_choice"])) != 4:
        return "not four different choices"
    if truth not in row["multi_choice"]:
        return f"the choices lack the truth, {truth}"
    if row["answer"] != truth:
        return f"the answer is {row['answer']}, the truth {truth}"


def judge_cot(row, events):
    """[CoT valid]: None, or what is wrong with the chain given the true events and the answer. A
    word that belongs to no step makes it invalid, too."""
    match = re.fullmatch(r"<think>(.+)</think><answer>(.+)</answer>", row["cot"])
    if not match:
        return "not one think block and one answer block"
    if match[2] != row["answer"]:
        return f"the chain ends with {match[2]}, the answer is {row['answer']}"
    steps = list(STEP.finditer(match[1]))
    if not steps or " ".join(step[0] for step in steps) != match[1]:
        return "not a row of steps: a reason, a segment, and what is heard there"
    there = {(e["start_s"], e["end_s"]): (e["kind"], NUMBERS[e["pulses"]]) for e in events}
    pointed, kinds = [], [e["kind"] for e in events]
    for named, times, kind, number in (step.groups() for step in steps):
        segment = parse_segment(times, CLIP_S)
        if segment.reason:
            return f"segment {times}: {segment.reason}"
        truth = there.get((segment.start_s, segment.end_s), "nothing")
        if (kind, number) != truth or named not in (None, kind):
            return f"at {times} the chain hears {(kind, number)}, there is {truth}"
        pointed.append(kind)
    first = kinds.index(re.search(r"the (\S+)\?", row["question"])[1])
    if pointed != kinds[first:first + (2 if "right after" in row["question"] else 1)]:
        return "the chain listens to other sounds than the question needs"


# ---------------------------------------------------------------------------------- the pipeline

def make_split(settings, split, n_clips, sounds):
    """Write the WAV files of a split; return its clips (A1..A5), and (row, events, planted fault)
    of each row."""
    clips, rows, kinds = [], [], sorted(sounds or SYNTHETIC)
    for i in tqdm(range(n_clips), desc=f"{split} clips", unit="clip"):
        rng = np.random.default_rng([settings.seed, ("train", "test").index(split), i])
        samples, events = synthesise(rng, sounds)
        path = f"audio/{split}/{i:05d}.wav"
        write_atomically(Path(settings.out) / path, wav_bytes(samples))
        clips.append({"id": f"{split}-{i:05d}", "audio_path": path, **describe(events)})
        for category in CATEGORIES:
            row = {"id": f"{split}-{i:05d}-{category}", "audio_path": path,
                   **write_row(category, events, rng, kinds)}
            draw, planted = rng.random(), "intact"
            if split == "test":
                del row["cot"]
                row["category"] = category
            elif draw < settings.qa_faults + settings.cot_faults:
                faults = QA_FAULTS if draw < settings.qa_faults else COT_FAULTS
                planted = str(rng.choice(sorted(faults)))
                row |= faults[planted](row, events, kinds, rng)
            rows.append((row, events, planted))
    return clips, rows


def sort_rows(rows):
    """The judge's verdicts sort the rows; returns the sets, and a Counter of (planted, verdict)."""
    sets, seen = {"sft": [], "rl": [], "discarded": []}, Counter()
    for row, events, planted in rows:
        verdict, wrong = "sft", judge_qa(row, events)
        if wrong:
            verdict = "discarded"
            row["reason"] = wrong
        elif judge_cot(row, events):
            verdict = "rl"
            del row["cot"]
        sets[verdict].append(row)
        seen[planted, verdict] += 1
        seen["all", verdict] += 1
    return sets, seen


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def print_table(seen):
    print(f"\n{'planted':<18}{'rows':>7}{'-> sft':>9}{'-> rl':>9}{'-> discarded':>14}   caught")
    for planted in ("intact", *QA_FAULTS, *COT_FAULTS, "all"):
        sft, rl, discarded = (seen[planted, verdict] for verdict in ("sft", "rl", "discarded"))
        n, caught = sft + rl + discarded, ""
        if planted in QA_FAULTS or planted in COT_FAULTS:
            caught = f"   {discarded if planted in QA_FAULTS else rl}/{n}"
        print(f"{planted:<18}{n:>7}{sft:>9}{rl:>9}{discarded:>14}{caught}")


def run():
    settings = parse_settings(Settings, __doc__)
    if settings.qa_faults + settings.cot_faults > 1:
        raise EchoError("--qa-faults and --cot-faults: shares of all rows, together at most 1")
    if settings.hold_out >= 1:
        raise EchoError(f"--hold-out {settings.hold_out}: a share, at least 0 and below 1")
    train_sounds = test_sounds = None
    if settings.sounds:
        train_sounds, test_sounds = read_sounds(settings.sounds, settings.hold_out, settings.seed)
    clips, rows = make_split(settings, "train", settings.train_clips, train_sounds)
    _, test_rows = make_split(settings, "test", settings.test_clips, test_sounds)
    sets, seen = sort_rows(rows)
    test = [row for row, _, _ in test_rows]
    for name, items in {"clips": clips, **sets, "test": test}.items():
        write_atomically(Path(settings.out) / f"{name}.jsonl", json_lines(items))
    print_table(seen)
    print(f"test: {len(test)} questions on {settings.test_clips} clips of their own\n")
    row = next((row for row, _, planted in rows if planted == "intact"), rows[0][0])
    print(f"A row:\n{json.dumps(row, indent=2)}")


if __name__ == "__main__":
    main(run)
