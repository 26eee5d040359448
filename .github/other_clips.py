"""Clips of the toy's sounds by other code than make_data.py's, to try a trained model on:

    python .github/other_clips.py OUT      # OUT/plain, hard, free: 100 clips, 400 questions each

Three or four sounds of about a second in six seconds, touching or up to 3 s apart. plain: a quiet
noise behind them; hard: pulses with hard edges, and a hum of the mains; free: onsets anywhere, soft
edges and an echo (plain and hard begin on tenths of a second).
"""
# SPDX-License-Identifier: MIT
import json
import random
import sys
import wave
from pathlib import Path

import numpy as np

RATE, SECONDS = 16_000, 6.0
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def band(n, low, high, rng):
    """Noise between two frequencies, by filtering in the spectrum."""
    spectrum = np.fft.rfft(rng.normal(size=n))
    hz = np.fft.rfftfreq(n, 1 / RATE)
    return np.fft.irfft(np.where((hz >= low) & (hz < high), spectrum, 0), n)


def tones(n, frequencies, weights=None):
    t = np.arange(n) / RATE
    weights = weights or [1] * len(frequencies)
    return sum(w * np.cos(2 * np.pi * f * t + i)
               for i, (f, w) in enumerate(zip(frequencies, weights)))


def sweep(n, p):
    t = np.arange(n) / RATE % (1 / 30)  # thirty times a second from 700 to 1,900 Hz
    return np.cos(2 * np.pi * p * (700 * t + 18_000 * t ** 2))


SOUNDS = {
    "hum": lambda n, p, rng: tones(n, [110 * p, 330 * p]),
    "rumble": lambda n, p, rng: band(n, 0, 250 * p, rng),
    "buzz": lambda n, p, rng: tones(n, [220 * p * k for k in range(1, 16, 2)],
                                    [1 / k for k in range(1, 9)]),
    "tone": lambda n, p, rng: tones(n, [900 * p]),
    "chirp": lambda n, p, rng: sweep(n, p),
    "bell": lambda n, p, rng: tones(n, [1250 * p, 2070 * p, 3110 * p, 4390 * p]),
    "whistle": lambda n, p, rng: tones(n, [2600 * p]),
    "hiss": lambda n, p, rng: band(n, 4000 * p, RATE, rng)}


def pulses(n, count, edge_s):
    """`count` pulses, each on the middle 60% of its share of n samples."""
    period = n / count
    at = np.arange(n) % period
    inside_s = np.minimum(at - 0.2 * period, 0.8 * period - at) / RATE  # distance from an edge
    return np.clip(inside_s / edge_s + 0.5, 0, 1)


def places(n, style, dice):
    """Start and length of n sounds: neighbours touch, or one gap is up to 3 s long."""
    lengths = [round(dice.uniform(0.85, 1.1), 2 if style == "free" else 1) for _ in range(n)]
    spare = SECONDS - sum(lengths)
    gaps = [0.0] * n
    for k in dice.sample(range(1, n), dice.randint(1, n - 1)):
        gaps[k] = round(dice.uniform(0, min(3.0, spare - sum(gaps))), 2 if style == "free" else 1)
    gaps[0] = round(dice.uniform(0, max(0.0, spare - sum(gaps))), 2 if style == "free" else 1)
    out, at = [], 0.0
    for gap, length in zip(gaps, lengths):
        out.append((round(at + gap, 2), length))
        at += gap + length
    return out


def clip(style, dice, rng):
    n = dice.choice([3, 4])
    kinds = dice.sample(sorted(SOUNDS), n)
    if n == 4 and dice.random() < 0.7:  # one kind twice, not in a row, once fast and once slow
        kinds[2 if dice.random() < 0.5 else 1] = kinds[0]
        if kinds[0] == kinds[1]:
            kinds[1], kinds[2] = kinds[2], kinds[1]
    samples, events = rng.normal(size=int(RATE * SECONDS)) * 0.003, []
    for kind, (start, length) in zip(kinds, places(n, style, dice)):
        a, m = int(start * RATE), int(length * RATE)
        count = dice.choice(list(WORDS))
        before = [e["pulses"] for e in events if e["kind"] == kind]
        if before:
            count = dice.choice([2, 3] if before[0] > 3 else [4, 5, 6])
        sound = SOUNDS[kind](m, dice.uniform(0.87, 1.13), rng)
        edge_s = {"plain": 0.005, "hard": 1e-5, "free": 0.01}[style]
        loud = dice.uniform(0.08, 0.2) * sound / sound.std() * pulses(m, count, edge_s)
        samples[a:a + m] += loud[:len(samples[a:a + m])]
        events.append({"kind": kind, "start_s": start, "end_s": round(start + length, 2),
                       "pulses": count})
    if style == "hard":
        samples += 0.008 * np.sin(2 * np.pi * 50 * np.arange(len(samples)) / RATE)
    if style == "free":
        samples[1600:] += 0.25 * samples[:-1600]
    return samples, events


def ask(events):
    """A question of each category, [(category, question, answer, sounds to listen to), ...]."""
    twice = [e for e in events if sum(f["kind"] == e["kind"] for f in events) == 2]
    once = [i for i, e in enumerate(events) if e not in twice]
    followed = [i for i in once if i + 1 < len(events)]
    e = events[once[0]]
    out = [("count", f"How many pulses has the {e['kind']}?", WORDS[e["pulses"]], [e])]
    i = followed[-1]
    e, after = events[i:i + 2]
    out.append(("order", f"Which sound comes right after the {e['kind']}?", after["kind"],
                [e, after]))
    e, after = events[followed[0]:followed[0] + 2]
    out.append(("count_after", f"How many pulses has the sound right after the {e['kind']}?",
                WORDS[after["pulses"]], [e, after]))
    found = [e for e in twice if events.index(e) + 1 < len(events)][-1:]
    found = found or [events[followed[0]]]
    i = events.index(found[0])
    looks = [e for e in events[:i] if e["kind"] == found[0]["kind"]] + events[i:i + 2]
    name = f"{'slow' if found[0]['pulses'] < 4 else 'fast'} {found[0]['kind']}"
    out.append(("find", f"How many pulses has the sound right after the {name}?",
                WORDS[events[i + 1]["pulses"]], looks))
    return out


def write(out, style, n_clips=100):
    rows = []
    (out / style / "audio").mkdir(parents=True, exist_ok=True)
    for i in range(n_clips):
        dice, rng = random.Random(f"{style} {i}"), np.random.default_rng([7, len(style), i])
        samples, events = clip(style, dice, rng)
        path = f"audio/{i:03d}.wav"
        with wave.open(str(out / style / path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes())
        for category, question, answer, looks in ask(events):
            pool = sorted(SOUNDS) if category == "order" else list(WORDS.values())
            wrong = [x for x in pool if x != answer and x not in question.split("the ")[-1]]
            choices = dice.sample([answer, *dice.sample(wrong, 3)], 4)
            rows.append({"id": f"{style}-{i:03d}-{category}", "audio_path": path,
                         "question": question, "multi_choice": choices, "answer": answer,
                         "category": category, "listen_to": looks})
    (out / style / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    for name in ("plain", "hard", "free"):
        write(Path(sys.argv[1]), name)
