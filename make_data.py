"""Make the toy world: clips with known events, and the paper's structured data pipeline on top of them.

    python make_data.py                      # data/: 2,600 clips as 16-bit WAV, 500 MB, 22 seconds

The pipeline has the paper's shape. A generator knows the true events of a clip and writes
    A1 description  A2 speech  A3 music  A4 timestamped events  A5 duration          -> clips.jsonl
    question, four choices, answer and a grounded chain of thought (QA+CoT), by rule
A known share of the QA+CoT is broken on purpose. A judge, which sees the row and the events but not
what was planted, gives two verdicts and so sorts the rows:
    [QA valid] and [CoT valid] -> sft.jsonl     only [QA valid] -> rl.jsonl, chain dropped
    QA invalid -> discarded.jsonl, with the judge's reason
test.jsonl holds questions on clips of its own. Left out: a language model as writer and as judge.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from echo import EchoError, main, parse_segment, parse_settings, wav_bytes, write_atomically, write_jsonl

KINDS = ("hum", "rumble", "buzz", "tone", "chirp", "bell", "whistle", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # the fine detail: pulses in a sound
CATEGORIES = ("count", "order", "count_after")


@dataclass
class Settings:
    out: str = "data"        # folder to write
    train_clips: int = 2400  # one row of each category per clip; more clips: fewer chances to learn them by heart
    test_clips: int = 200
    seed: int = 0            # same seed, same bytes
    qa_faults: float = 0.06  # share of rows whose question or answer is broken on purpose
    cot_faults: float = 0.22 # share of rows whose chain is broken on purpose (the paper's RL : SFT is 22 : 76)


SAMPLE_RATE = 16_000
CLIP_S = 6.0
SOUND_S = 1.0  # every sound lasts one second ...
GRID_S = 0.5   # ... and starts on this grid, which is also the thumbnail's: a first listen can say where, not how many


# ---------------------------------------------------------------------------------------------- sounds

def carrier(kind, t, rng):
    """The sound of a kind at times `t` (seconds), about unit power; its pitch varies by 15% either way."""
    pitch = rng.uniform(0.85, 1.15)
    if kind in ("rumble", "hiss"):  # noise below 250 Hz, noise above 4 kHz
        spectrum = np.fft.rfft(rng.standard_normal(t.size))
        hz = np.fft.rfftfreq(t.size, 1 / SAMPLE_RATE)
        spectrum[hz > 250 * pitch if kind == "rumble" else hz < 4000 * pitch] = 0
        wave = np.fft.irfft(spectrum, t.size)
    elif kind == "chirp":           # 30 upward sweeps a second, 700 to 1,900 Hz
        phase = (30 * t) % 1.0
        wave = np.sin(2 * np.pi * pitch * (700 * phase + 600 * phase ** 2) / 30)
    else:
        hz = {"hum": (110, 330), "buzz": tuple(220 * k for k in range(1, 16, 2)), "tone": (900,),
              "bell": (1250, 2070, 3110, 4390), "whistle": (2600,)}[kind]
        weights = 1 / np.arange(1, len(hz) + 1) if kind == "buzz" else np.ones(len(hz))
        wave = sum(w * np.sin(2 * np.pi * pitch * f * t) for w, f in zip(weights, hz))
    return wave / np.sqrt(np.mean(wave ** 2))


def pulse_train(n_pulses, n_samples):
    """(n_samples,) envelope of equal pulses, on 60% of the time, symmetric about the middle.

    Both halves of the second carry the same power whatever the number, so an average over half a second
    (the first listen) says nothing about the number.
    """
    edge = from_edge(n_pulses, (np.arange(n_samples) + 0.5) / n_samples)
    return np.clip(edge / n_pulses * SOUND_S / 0.004 + 0.5, 0, 1)  # 4 ms ramps, centred on the edges


def from_edge(n_pulses, t):
    """How far inside a pulse the time `t` (0 to 1 over the sound) lies, in periods; negative between pulses."""
    return 0.3 - abs(t * n_pulses % 1.0 - 0.5)


def synthesise(rng):
    """One clip: (N,) float samples in [-1, 1] and its events, in order of time."""
    n_sounds = int(rng.integers(3, 5))
    slots, per_sound = round(CLIP_S / GRID_S), round(SOUND_S / GRID_S)
    free = slots - n_sounds * per_sound
    gaps = np.sort(rng.integers(0, free + 1, n_sounds))      # slots of silence before each sound, cumulated
    t = np.arange(round(CLIP_S * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.fft.rfft(rng.standard_normal(t.size))
    tilt = rng.uniform(0.0, 1.0)                             # background: white (0) to brown (1)
    noise[1:] /= np.arange(1, noise.size) ** tilt
    noise = np.fft.irfft(noise, t.size)
    wave = noise / noise.std() * 10 ** (rng.uniform(-56, -46) / 20)
    events = []
    for i, kind in enumerate(rng.choice(KINDS, n_sounds, replace=False)):
        start_s = float((gaps[i] + i * per_sound) * GRID_S)
        pulses = int(rng.choice(list(NUMBERS)))
        a = round(start_s * SAMPLE_RATE)
        b = a + round(SOUND_S * SAMPLE_RATE)
        level = 10 ** (rng.uniform(-22, -14) / 20)
        wave[a:b] += level * carrier(str(kind), t[a:b], rng) * pulse_train(pulses, b - a)
        events.append({"kind": str(kind), "start_s": start_s, "end_s": start_s + SOUND_S, "pulses": pulses})
    return np.clip(wave, -1, 1), events


def describe(events):
    """A1..A5 of a clip, from its true events."""
    names = [f"a {e['kind']}" for e in events]
    return {"A1_description": f"A recording with {', '.join(names[:-1])} and {names[-1]}.",
            "A2_speech": "none", "A3_music": "none", "A4_events": events, "A5_duration_s": CLIP_S}


# ---------------------------------------------------------------------------------------------- QA + CoT

def look_for(event):
    """The sentence that points at a sound, and says what is heard there."""
    return f"I look for the {event['kind']} {seg(event)} {heard(event)}"


def then_comes(event):
    return f"Right after it {seg(event)} {heard(event)}"


def seg(event):
    return f"<seg>{event['start_s']:.1f}, {event['end_s']:.1f}</seg>"


def heard(event):
    return f"the {event['kind']} has {NUMBERS[event['pulses']]} pulses."


def write_row(category, events, rng):
    """Question, four choices, answer and grounded chain for a clip; keys as in the published rows."""
    i = int(rng.integers(len(events) - (category != "count")))
    event, after = events[i], events[min(i + 1, len(events) - 1)]
    kind = event["kind"]
    question, answer = {
        "count": (f"How many pulses has the {kind}?", NUMBERS[event["pulses"]]),
        "order": (f"Which sound comes right after the {kind}?", after["kind"]),
        "count_after": (f"How many pulses has the sound right after the {kind}?", NUMBERS[after["pulses"]]),
    }[category]
    pool = [x for x in (KINDS if category == "order" else NUMBERS.values()) if x not in (answer, kind)]
    choices = [str(c) for c in rng.permutation([answer, *rng.choice(pool, 3, replace=False)])]
    steps = [look_for(event)] + ([then_comes(after)] if category != "count" else [])
    cot = f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"
    return {"question": question, "multi_choice": choices, "answer": answer, "cot": cot}


# ---------------------------------------------------------------------------------------------- planted faults

def other(rng, pool, *but):
    return str(rng.choice([x for x in pool if x not in but]))


def shift_segment(row, events, rng):
    s, e = map(float, re.search("<seg>(.*?), (.*?)</seg>", row["cot"]).groups())
    shift = 0.5 if s == 0 or e < CLIP_S and rng.random() < 0.5 else -0.5
    return {"cot": row["cot"].replace(f"<seg>{s:.1f}, {e:.1f}", f"<seg>{s + shift:.1f}, {e + shift:.1f}")}


def miscount(row, events, rng):
    said = re.search(r"has (\w+) pulses", row["cot"]).group(1)
    return {"cot": row["cot"].replace(f"has {said} pulses", f"has {other(rng, NUMBERS.values(), said)} pulses", 1)}


def misname(row, events, rng):
    said = re.search(r"</seg> the (\w+)", row["cot"]).group(1)
    return {"cot": row["cot"].replace(f"</seg> the {said}", f"</seg> the {other(rng, KINDS, said)}", 1)}


def contradict(row, events, rng):
    said = other(rng, row["multi_choice"], row["answer"])
    return {"cot": row["cot"].replace(f"<answer>{row['answer']}<", f"<answer>{said}<")}


def wrong_answer(row, events, rng):
    """The answer and the chain's last word, both wrong in the same way."""
    answer = other(rng, row["multi_choice"], row["answer"])
    return {"answer": answer, "cot": row["cot"].replace(f"<answer>{row['answer']}<", f"<answer>{answer}<")}


def absent_sound(row, events, rng):
    kind = other(rng, KINDS, *(e["kind"] for e in events))
    return {"question": re.sub(r"the (\w+)\?", f"the {kind}?", row["question"])}


def lost_choice(row, events, rng):
    pool = NUMBERS.values() if row["answer"] in NUMBERS.values() else KINDS
    return {"multi_choice": [other(rng, pool, *row["multi_choice"]) if c == row["answer"] else c
                             for c in row["multi_choice"]]}


def double_choice(row, events, rng):
    double = other(rng, row["multi_choice"], row["answer"])
    return {"multi_choice": [row["answer"] if c == double else c for c in row["multi_choice"]]}


QA_FAULTS = {f.__name__: f for f in (wrong_answer, absent_sound, lost_choice, double_choice)}
COT_FAULTS = {f.__name__: f for f in (shift_segment, miscount, misname, contradict)}
COT_FAULTS["past_the_end"] = lambda row, events, rng: {"cot": re.sub(r", [\d.]+</seg>", ", 7.5</seg>", row["cot"], count=1)}
COT_FAULTS["reversed"] = lambda row, events, rng: {"cot": re.sub(r"<seg>([\d.]+), ([\d.]+)", r"<seg>\2, \1", row["cot"], count=1)}
COT_FAULTS["no_segment"] = lambda row, events, rng: {"cot": re.sub("<seg>.*?</seg> ", "", row["cot"])}
COT_FAULTS["broken_tag"] = lambda row, events, rng: {"cot": row["cot"].replace("</think>", "")}


# ---------------------------------------------------------------------------------------------- the judge

def judge_qa(row, events):
    """[QA valid]: None, or what is wrong with question, choices or answer given the true events."""
    match = re.fullmatch(r"(How many pulses has|Which sound comes|How many pulses has the sound) ?"
                         r"(right after )?the (\w+)\?", row["question"])
    if not match:
        return "the question has no known form"
    kinds = [e["kind"] for e in events]
    if kinds.count(match[3]) != 1:
        return f"the clip does not hold exactly one {match[3]}"
    i = kinds.index(match[3]) + bool(match[2])
    if i == len(events):
        return f"nothing comes after the {match[3]}"
    truth = events[i]["kind"] if match[1].startswith("Which") else NUMBERS[events[i]["pulses"]]
    if len(row["multi_choice"]) != 4 or len(set(row["multi_choice"])) != 4:
        return "not four different choices"
    if truth not in row["multi_choice"]:
        return f"the choices lack the truth, {truth}"
    if row["answer"] != truth:
        return f"the answer is {row['answer']}, the truth {truth}"
    return None


def judge_cot(row, events):
    """[CoT valid]: None, or what is wrong with the chain given the true events and the row's answer."""
    match = re.fullmatch(r"<think>(.+)</think><answer>(.+)</answer>", row["cot"])
    if not match or re.search("</?(think|answer)>", match[1] + match[2]):
        return "not one think block and one answer block"
    if match[2] != row["answer"]:
        return f"the chain ends with {match[2]}, the answer is {row['answer']}"
    steps = re.findall(r"(\S[^<>]*)<seg>([^<]*)</seg> the (\w+) has (\w+) pulses\.", match[1])
    if not steps or len(steps) != match[1].count("<seg>"):
        return "no segment with a reason before it and what is heard after it"
    pointed = []
    for reason, times, kind, number in steps:
        segment = parse_segment(times, CLIP_S)
        if segment.reason:
            return f"segment {times}: {segment.reason}"
        here = [e for e in events if (e["start_s"], e["end_s"]) == (segment.start_s, segment.end_s)]
        if not here:
            return f"no event at {times}"
        if here[0]["kind"] != kind or NUMBERS[here[0]["pulses"]] != number:
            return f"at {times} the chain hears a {kind} with {number} pulses, there is a {here[0]}"
        pointed.append(events.index(here[0]))
    asked = re.search(r"the (\w+)\?", row["question"])[1]
    first = [e["kind"] for e in events].index(asked)
    if pointed != ([first, first + 1] if "right after" in row["question"] else [first]):
        return "the chain listens to other sounds than the question needs"
    return None


# ---------------------------------------------------------------------------------------------- the pipeline

def make_split(settings, split, n_clips, out):
    """Write the WAV files of a split; return its clips (A1..A5) and rows ({row, events, planted})."""
    clips, rows = [], []
    for i in tqdm(range(n_clips), desc=f"{split} clips", unit="clip"):
        rng = np.random.default_rng([settings.seed, ("train", "test").index(split), i])
        wave, events = synthesise(rng)
        path = f"audio/{split}/{i:05d}.wav"
        write_atomically(out / path, wav_bytes(wave, SAMPLE_RATE))
        clips.append({"id": f"{split}-{i:05d}", "audio_path": path, **describe(events)})
        for category in CATEGORIES:
            row = {"id": f"{split}-{i:05d}-{category}", "audio_path": path, **write_row(category, events, rng)}
            draw, planted = rng.random(), None
            if split == "train" and draw < settings.qa_faults + settings.cot_faults:
                faults = QA_FAULTS if draw < settings.qa_faults else COT_FAULTS
                planted = str(rng.choice(sorted(faults)))
                row |= faults[planted](row, events, rng)
            rows.append((row, events, planted, category))
    return clips, rows


def sort_rows(rows):
    """The judge's verdicts sort the rows; returns the sets and how often each planted fault was seen."""
    sets, table = {"sft": [], "rl": [], "discarded": []}, {}
    for row, events, planted, _ in rows:
        qa = judge_qa(row, events)
        cot = None if qa else judge_cot(row, events)
        verdict = "discarded" if qa else "rl" if cot else "sft"
        if qa:
            row = {**row, "reason": qa}
        sets[verdict].append({k: v for k, v in row.items() if k != "cot"} if verdict == "rl" else row)
        table.setdefault(planted or "sound row", Counter())[verdict] += 1
    return sets, table


def run():
    settings = parse_settings(Settings, __doc__)
    if settings.train_clips < 1 or settings.test_clips < 1:
        raise EchoError("--train_clips and --test_clips: must be at least 1")
    if settings.qa_faults < 0 or settings.cot_faults < 0 or settings.qa_faults + settings.cot_faults > 1:
        raise EchoError("--qa_faults and --cot_faults: shares of all rows, at least 0 and together at most 1")
    out = Path(settings.out)
    clips, rows = make_split(settings, "train", settings.train_clips, out)
    _, test_rows = make_split(settings, "test", settings.test_clips, out)
    sets, table = sort_rows(rows)
    test = [{k: v for k, v in row.items() if k != "cot"} | {"category": category}
            for row, events, _, category in test_rows if judge_qa(row, events) is None]
    for name, items in {"clips": clips, **sets, "test": test}.items():
        write_jsonl(out / f"{name}.jsonl", items)

    print(f"\n{'planted':<16}{'rows':>7}{'-> sft':>9}{'-> rl':>9}{'-> discarded':>14}   caught")
    for planted, seen in sorted(table.items(), key=lambda kv: (kv[0] in COT_FAULTS, kv[0] in QA_FAULTS, kv[0])):
        n = sum(seen.values())
        caught = "" if planted == "sound row" else f"{seen['discarded' if planted in QA_FAULTS else 'rl']}/{n}"
        print(f"{planted:<16}{n:>7}{seen['sft']:>9}{seen['rl']:>9}{seen['discarded']:>14}   {caught}")
    print(f"{'all':<16}{len(rows):>7}" + "".join(f"{len(sets[s]):>{w}}" for s, w in (("sft", 9), ("rl", 9), ("discarded", 14))))
    print(f"test: {len(test)} questions on {settings.test_clips} clips of their own\n")
    print("One clip and its row:")
    row, events, _, _ = next((r for r in rows if r[2] is None and r[3] == "count_after"), rows[0])
    for e in events:
        print(f"  {e['start_s']:.1f} to {e['end_s']:.1f} s  {e['kind']}, {e['pulses']} pulses")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main(run)
