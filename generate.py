"""Use a trained Echo: one clip, a benchmark file, or a page of either.

    python generate.py                                                  # a held-out toy clip
    python generate.py --clip clip.wav --question "How many pulses has the hum?" --choices two three
    python generate.py --benchmark data/test.jsonl --output runs/test.json
    python generate.py --html trace.html                       # with any of these: a page of it

Decoding is the very function that train_rl.py rolls out with, but greedy.
"""
# SPDX-License-Identifier: MIT
import base64
import json
import sys
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from echo import (AUDIO, SAMPLE_RATE, EchoError, Rollout, Sample, batches, cut,
                  extract_answer, is_right, load, main, parse_settings, pick_device, processes,
                  rollouts, same_answer, split_segments, sum_over_processes)
from make_data import (Question, load_audio, read_questions, segment_of, wav_bytes,
                       write_atomically)


def silence(wave, start_s, end_s):
    """A control: a segment's length of silence."""
    return torch.zeros_like(cut(wave, start_s, end_s))


def elsewhere(wave, start_s, end_s):
    """A control: as long a piece, half a clip further on."""
    return cut(wave.roll(-(len(wave) // 2)), start_s, end_s)


LISTEN = {"segment": cut, "nothing": None, "silence": silence, "elsewhere": elsewhere}


@dataclass
class Settings:
    clip: str = ""                   # a WAV file
    question: str = ""               # what to ask about it
    choices: list[str] = field(default_factory=list)  # the answers to choose from
    model: str = "runs/rl"           # checkpoint folder
    listen: Literal[tuple(LISTEN)] = "segment"  # or nothing: text reasoning; silence, elsewhere
    bf16: bool = False               # bf16 arithmetic in the decoder
    benchmark: str = ""              # a data file: toy, native, MMAR or MMAU rows
    output: str = ""                 # a file for the answered rows
    audio_root: str = ""             # audio paths are relative to it, or to the data file's folder
    batch: int = 50                  # questions decoded together
    html: str = ""                   # write a page of traces


def answer(model, questions, listen=cut, batch=50):
    """A greedy Rollout for each Question; one whose clip can't be read has `ended` say why."""
    responses = []
    for some in tqdm(batches(questions, batch), "answers", leave=False, disable=processes()[0] > 0):
        waves, rows = {}, {}
        for k, q in enumerate(some):
            try:
                waves[k] = load_audio(q.path)
            except (EchoError, OSError) as error:
                rows[k] = Rollout(Sample(), None, None, ended=str(error))
        rows |= zip(waves, rollouts(model, [some[k] for k in waves], list(waves.values()), listen,
                                    temperature=0.0))
        responses += [rows[k] for k in range(len(some))]
    return responses


def overlap(segment, event):
    """Intersection over union of a Segment and a sound, as the toy's events tell it."""
    both_s = min(segment.end_s, event["end_s"]) - max(segment.start_s, event["start_s"])
    all_s = segment.end_s - segment.start_s + event["end_s"] - event["start_s"]
    return max(0.0, both_s) / (all_s - max(0.0, both_s))


def measure(questions, responses, categories=()):
    """The metrics of the responses of all processes; the README defines each. One without a case,
    such as the hits of no segments, is left out."""
    counts = {name: [0, 0] for name in ("accuracy", *sorted(categories))}
    for q, r in zip(questions, responses):
        for name in {"accuracy", q.category} & counts.keys():
            counts[name][0] += q.answer is not None and is_right(r.text, q.answer)
            counts[name][1] += q.answer is not None
    n, segments = len(responses), [s for r in responses for s in r.segments]
    searched = [(q, r) for q, r in zip(questions, responses) if "listen_to" in q.row]  # the toy's
    pairs = [pair for q, r in searched for pair in zip(r.heard_segments, q.row["listen_to"])]
    heard = sum(len(r.heard_segments) for _, r in searched)
    n_heard = sum(s.heard for s in segments)
    counts |= {"hits": (sum((s.start_s, s.end_s) == segment_of(e) for s, e in pairs), heard),
               "iou": (sum(overlap(s, e) for s, e in pairs), heard),
               "segments": (n_heard, n),
               "rejected": (len(segments) - n_heard, len(segments)),
               "truncated": (sum(r.ended == "length" for r in responses), n),
               "length": (sum(len(r.logprobs) for r in responses), n),
               "audio_tokens": (sum(r.sample.ids.count(AUDIO) for r in responses), n)}
    sums = {name: [*map(sum_over_processes, pair)] for name, pair in counts.items()}
    return {name: top / bottom for name, (top, bottom) in sums.items() if bottom}


def trace(rollout):
    """What a benchmark's row keeps of a Rollout. The answer's text alone is what the evaluators
    read, MMAR's as answer_prediction, MMAU's as model_output."""
    said = extract_answer(rollout.text) or ""
    return {"answer_prediction": said, "model_output": said, "response": rollout.text,
            "segments": [asdict(s) for s in rollout.segments], "ended": rollout.ended}


def print_clip(q, rollout):
    """The question, the response with a mark where it stopped to listen, and the answer."""
    pairs, rest = split_segments(rollout.text)
    text, said = "", extract_answer(rollout.text)
    for (before, tag), s in zip(pairs, rollout.segments):
        mark = f"listens to {s.start_s:.2f} to {s.end_s:.2f} s" if s.heard else s.refused
        text += f"{before}{tag} [{mark}]"
    truth = f"   truth: {q.answer}" if q.answer else ""
    print(f"{q.path} ({len(rollout.wave) / SAMPLE_RATE:.1f} s)\n{q.question} "
          f"{', '.join(q.choices)}\n\n{text}{rest}\n\nanswer: "
          f"{said or f'(none, ended: {rollout.ended})'}{truth}")


def use(model, settings):
    """Answer a question or a file of them; the exit code is 1 if one could not be answered."""
    clip, question, choices = settings.clip, settings.question, settings.choices
    if settings.benchmark:
        questions = read_questions(settings.benchmark, settings.audio_root, needs=())
    elif clip and question:
        questions = [Question({}, Path(clip), question, choices, None, "")]
    elif clip or question or choices:
        raise EchoError("--clip and --question: needed are both, and perhaps --choices a b c d")
    else:
        toy = read_questions("data/test.jsonl")  # the one that needs the most looks
        questions = [max(toy, key=lambda q: len(q.row.get("listen_to", ())))]
    responses = answer(model, questions, LISTEN[settings.listen], settings.batch)
    broken = [f"{q.row.get('id', q.path)}: {r.ended}" for q, r in zip(questions, responses)
              if not r.logprobs]
    if broken and not settings.benchmark:
        raise EchoError(broken[0])
    if settings.benchmark:
        unscored = sum(q.answer is None for q in questions)
        if unscored:
            print(f"{unscored} of {len(questions)} have no answer among their choices: not scored",
                  file=sys.stderr)
        metrics = measure(questions, responses, {q.category for q in questions})
        print("\n".join(f"{name:<16}{value:8.4g}" for name, value in metrics.items()))
    else:
        print_clip(questions[0], responses[0])
    if settings.output:
        rows = [q.row | trace(r) for q, r in zip(questions, responses)]
        write_atomically(settings.output, json.dumps(rows, ensure_ascii=False, indent=2))
    if settings.html:  # the first ones, since each carries its audio
        write_page(settings.html, "Echo listens again", "".join(
            trace_html(q, r) for q, r in zip(questions[:60], responses) if r.logprobs))
    if broken:
        print("\n".join([*broken, f"{len(broken)} of {len(questions)} can't be answered"]),
              file=sys.stderr)
    return 1 if broken else 0


# ==================================================================================================
# From here on: drawing. A reader of the method can stop.

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><style>
body{margin:auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui,sans-serif}
.axis{display:flex;justify-content:space-between;font-size:.8rem;color:#777}
.loudness{position:relative}svg,audio{width:100%}svg{height:8rem;display:block;overflow:visible}
.span{position:absolute;top:0;bottom:0;box-sizing:border-box;border:solid var(--c);
border-width:0 2px;background:color-mix(in srgb,var(--c) 27%,#0000)}
.response,svg{background:#8881;border-radius:8px;stroke-width:2}
.response{padding:.8rem;overflow-wrap:anywhere;white-space:pre-wrap}
.chip{font:inherit;color:#777;border:1px dashed;border-radius:1rem;padding:0 .6rem}
button.chip{color:#fff;background:var(--c);border:0;cursor:pointer}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.right{color:#2f9e44}.wrong{color:#e03131}</style>"""
SCRIPT = """<script>
for (const clip of document.querySelectorAll('.clip')) clip.onclick = event => {
  const part = event.target.closest('[data-start]'), audio = clip.querySelector('audio');
  if (!part) return;
  audio.currentTime = part.dataset.start;
  audio.ontimeupdate = () => { if (audio.currentTime >= part.dataset.end) audio.pause(); };
  audio.play();
};
</script>"""


def write_page(path, title, body):
    title = escape(title)
    write_atomically(path, f"{STYLE}<title>{title}</title><h1>{title}</h1>{body}{SCRIPT}")
    print(f"wrote {path}", file=sys.stderr)


def line_svg(points):
    """A line through points (x, y), x from 0 on, as high and as wide as its box."""
    xs, ys = zip(*points)
    low, high = min(0.0, *ys), max(0.0, *ys) or 1.0
    at = " ".join(f"{300 * x / (xs[-1] or 1):.1f},{100 * (high - y) / (high - low):.1f}"
                  for x, y in points)
    return (f'<svg viewBox="0 0 300 100" preserveAspectRatio="none"><polyline points="{at}" '
            f'fill="none" stroke="{COLOURS[0]}" vector-effect="non-scaling-stroke"/></svg>')


def response_html(rollout, seconds):
    """The response, a chip for every closed tag; and spans of the clip for what was heard."""
    pairs, rest = split_segments(rollout.text)
    response, spans = "", ""
    for i, ((before, tag), s) in enumerate(zip(pairs, rollout.segments)):
        if not s.heard:
            chip = f'<span class="chip">{escape(tag)} &#10007; {s.refused}</span>'
        else:
            part = (f'data-start="{s.start_s}" data-end="{s.end_s}" style="--c:{COLOURS[i % 8]};'
                    f'left:{s.start_s / seconds:.2%};right:{1 - s.end_s / seconds:.2%}"')
            chip = f'<button class="chip" {part} title="play this">&#9654; {escape(tag)}</button>'
            spans += f'<div class="span" {part}></div>'  # left and right don't move the chip
        response += escape(before) + chip
    return response + escape(rest), spans


def trace_html(q, rollout):
    """Loudness with the segments' spans, player, response with its chips, answer and truth."""
    wave = rollout.wave
    seconds, said = len(wave) / SAMPLE_RATE, extract_answer(rollout.text) or ""
    response, spans = response_html(rollout, seconds)
    verdict = "" if not q.answer else "right" if same_answer(said, q.answer) else "wrong"
    ticks = "".join(f"<span>{seconds * i / 6:.1f} s</span>" for i in range(7))
    loudness = list(enumerate(F.adaptive_max_pool1d(wave.abs()[None], 600)[0].tolist()))
    sound = base64.b64encode(wav_bytes(wave.numpy().clip(-1, 1))).decode()
    return f"""<div class="clip"><div class="loudness">{line_svg(loudness)}{spans}</div>
<div class="axis">{ticks}</div><audio controls src="data:audio/wav;base64,{sound}"></audio>
<p><b>{escape(q.question)}</b> {escape(", ".join(q.choices))}</p>
<div class="response">{response}</div>
<p>Answer: <b>{escape(said or "none")}</b> <b class="{verdict}">{verdict}</b>
truth: {escape(q.answer or "?")}, ended: {rollout.ended}</p></div>"""


def report_page(folder):
    """report.html in a run's folder: a line for each metric of its log."""
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    charts = ""
    for name in dict.fromkeys(name for entry in log for name in entry if name != "step"):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        charts += (f"<div><b>{escape(name)}</b> {points[0][1]:.3g} to {points[-1][1]:.3g}"
                   f"{line_svg(points)}</div>")
    write_page(Path(folder) / "report.html", f"How {folder} learned",
               f'<div class="grid">{charts}</div>')


def run():
    settings = parse_settings(Settings, __doc__)
    model = load(settings.model, pick_device())
    model.bf16 = settings.bf16
    return use(model, settings)


if __name__ == "__main__":
    main(run)
