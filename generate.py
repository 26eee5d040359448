"""Use a trained Echo: one clip, a benchmark file, or a page of either.

    python generate.py                                                  # a held-out toy clip
    python generate.py --clip clip.wav --question "How many pulses has the hum?" --choices two three
    python generate.py --benchmark data/test.jsonl --output runs/test.json
    python generate.py --html trace.html                       # with any of these: a page of it

Decoding is the very function that train_rl.py rolls out with, here greedy by default.
"""
# SPDX-License-Identifier: MIT
import base64
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from echo import (AUDIO, SAMPLE_RATE, EchoError, Rollout, Sample, batches, cut, extract_answer,
                  is_right, load, main, means, model_folder, parse_settings, pick_device,
                  processes, rollouts, split_segments)
from make_data import (Question, load_audio, name_of, read_questions, segment_of, wav_bytes,
                       write_atomically)


def silence(wave, start_s, end_s):
    """A control: a segment's length of silence."""
    return torch.zeros_like(cut(wave, start_s, end_s))


def elsewhere(wave, start_s, end_s):
    """A control: as long a piece, half a clip further on."""
    return cut(wave.roll(-(len(wave) // 2)), start_s, end_s)


SHOWN = 60  # rows on a page of traces
LISTEN = {"segment": cut, "nothing": None, "silence": silence, "elsewhere": elsewhere}


@dataclass
class Settings:
    clip: str = ""                   # a WAV file
    question: str = ""               # what to ask about it
    choices: list[str] = field(default_factory=list)  # the answers to choose from
    model: str = "runs/rl"           # checkpoint folder
    listen: Literal[tuple(LISTEN)] = "segment"  # or nothing: text reasoning; silence, elsewhere
    temperature: float = 0.0         # 0: greedy; the paper: 0.7
    seed: int = 0                    # of the draws, where the temperature is above 0
    max_turns: int = 0               # segments heard in a response; 0: as the model has it
    max_new_tokens: int = 0          # sampled tokens of a response; 0: as the model has it
    bf16: bool = False               # bf16 arithmetic in the decoder
    benchmark: str = ""              # a data file: toy, native, MMAR or MMAU rows
    output: str = ""                 # a file for the answered rows
    audio_root: str = ""             # audio paths are relative to it, or to the data file's folder
    batch: int = 50                  # questions decoded together
    html: str = ""                   # write a page of traces


def set_limits(model, settings):
    """The limits that flags give, instead of those saved with the model."""
    context = model.decoder.config.max_position_embeddings
    for name in ("max_turns", "max_new_tokens"):
        value = getattr(settings, name)
        if value >= context:
            raise EchoError(f"--{name.replace('_', '-')} {value}: the decoder's context is "
                            f"{context} tokens; give less")
        if value:
            model.config = replace(model.config, **{name: value})


def answer(model, questions, listen=cut, batch=50, temperature=0.0, seed=0, done=None):
    """A Rollout for each Question; one whose clip can't be read has `ended` say why. done(responses
    so far) is called after each batch."""
    responses = []
    for some in tqdm(batches(questions, batch), "answers", leave=False, disable=processes()[0] > 0):
        waves, rows = {}, {}
        for k, q in enumerate(some):
            try:
                if q.problem:
                    raise EchoError(q.problem)
                waves[k] = load_audio(q.path)
            except (EchoError, OSError) as error:
                rows[k] = Rollout(Sample(), None, None, ended=str(error))
        seeds = [(seed, len(responses) + k) for k in waves]
        heard = rollouts(model, [some[k] for k in waves], list(waves.values()), listen, temperature,
                         seeds)
        rows |= zip(waves, heard)
        responses += [rows[k] for k in range(len(some))]
        if done:
            done(responses)
    return responses


def overlap(segment, event):
    """Intersection over union of a Segment and a sound, as the toy's events tell it."""
    both_s = min(segment.end_s, event["end_s"]) - max(segment.start_s, event["start_s"])
    all_s = segment.end_s - segment.start_s + event["end_s"] - event["start_s"]
    return max(0.0, both_s) / (all_s - max(0.0, both_s))


def measure(questions, responses, categories=()):
    """The metrics of the responses of all processes; .github/RESULTS.md defines each. One without a
    case, such as the hits of no segments, is left out."""
    counts = {f"accuracy_{category}": [0, 0] for category in sorted(categories)}
    counts["accuracy"] = [0, 0]
    for q, r in zip(questions, responses):
        for name in {"accuracy", f"accuracy_{q.category}"} & counts.keys():
            counts[name][0] += q.answer is not None and is_right(r.text, q)
            counts[name][1] += q.answer is not None
    n, segments = len(responses), [s for r in responses for s in r.segments]
    toy = [(q, r) for q, r in zip(questions, responses) if q.listen_to]  # true places are known
    pairs = [pair for q, r in toy for pair in zip(r.heard_segments, q.listen_to)]
    heard, n_heard = sum(len(r.heard_segments) for _, r in toy), sum(s.heard for s in segments)
    true_s = [segment_of(e) for _, e in pairs]
    counts |= {"hits": (sum((s.start_s, s.end_s) == segment_of(e) for s, e in pairs), heard),
               "iou": (sum(overlap(s, e) for s, e in pairs), heard),
               "heard_s": (sum(s.end_s - s.start_s for s, _ in pairs), len(pairs)),
               "sound_s": (sum(end_s - start_s for start_s, end_s in true_s), len(pairs)),
               "segments": (n_heard, n),
               "rejected": (len(segments) - n_heard, len(segments)),
               "truncated": (sum(r.ended == "length" for r in responses), n),
               "length": (sum(len(r.logprobs) for r in responses), n),
               "audio_tokens": (sum(r.sample.ids.count(AUDIO) for r in responses), n)}
    return means(counts)


def trace(rollout):
    """What a benchmark's row keeps of a Rollout. The answer's text alone is what the evaluators
    read, MMAR's as answer_prediction, MMAU's as model_output."""
    said = extract_answer(rollout.text) or ""
    return {"answer_prediction": said, "model_output": said,
            "echo": {"response": rollout.text, "ended": rollout.ended,
                     "segments": [asdict(s) for s in rollout.segments]}}


def write_rows(path, questions, responses):
    """The rows with their answers: a JSON list, or JSON lines if the file's name says so."""
    rows = [q.row | trace(r) for q, r in zip(questions, responses)]
    if ".jsonl" in Path(path).name.lower():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=2)
    write_atomically(path, text)


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


def check_outputs(settings, inputs):
    """Refuse outputs, or files on the way to them, that would destroy something."""
    written = [Path(file + end).resolve() for file in (settings.output, settings.html) if file
               for end in ("", ".tmp", ".part", ".part.tmp")]
    files = [*(Path(file).resolve() for file in inputs if "\0" not in str(file)), *written]
    taken = model_folder(settings.model).resolve()
    for file in written:
        no_file = file.exists() and not file.is_file()
        no_file = no_file or any(p.is_file() for p in file.parents)
        if files.count(file) > 1 or taken in file.parents or no_file:
            raise EchoError("--output and --html: needed are different files, and not the input, a "
                            "clip of the benchmark or the model's")
    part = Path(settings.output + ".part")
    if settings.output and part.exists():
        raise EchoError(f"{part}: what a run that was killed has answered; move or delete it")


def asked(settings):
    """The Questions that the flags ask for."""
    clip, question, choices = settings.clip, settings.question, settings.choices
    data = settings.benchmark or clip or "data/test.jsonl"
    check_outputs(settings, [data])
    if settings.benchmark and (clip or question or choices):
        raise EchoError("--benchmark has its own clips and questions; leave out --clip and others")
    if settings.audio_root and not settings.benchmark:
        raise EchoError("--audio-root is of a --benchmark; give either both or none")
    try:
        "".join([question, *choices]).encode()
    except UnicodeError:
        raise EchoError("--question, --choices: not UTF-8") from None
    if settings.benchmark:
        questions = read_questions(settings.benchmark, settings.audio_root, needs=())
        check_outputs(settings, {q.path for q in questions})
        return questions
    if clip and question:
        row = {"audio_path": clip, "question": question, "multi_choice": choices}
        return [Question(row, Path(clip), question, choices, None, "", ())]
    if clip or question or choices:
        raise EchoError("--clip and --question: needed are both, and perhaps --choices a b c d")
    return [max(read_questions(data), key=lambda q: len(q.listen_to))]  # most looks


def remark(settings, questions):
    """Say what the files that were written do not hold."""
    n = len(questions)
    replaced = sum(bool({"answer_prediction", "model_output", "echo"} & q.row.keys())
                   for q in questions)
    unscored = sum(q.answer is None for q in questions)
    if settings.html and n > SHOWN:
        print(f"{settings.html} shows the first {SHOWN} of {n}", file=sys.stderr)
    if settings.output and replaced:
        print(f"{replaced} of {n} had an answer or a trace already: replaced in {settings.output}",
              file=sys.stderr)
    if settings.benchmark and unscored:
        print(f"{unscored} of {n} have no answer among their choices: not scored", file=sys.stderr)


def use(model, settings):
    """Answer a question or a file of them; the exit code is 1 if one could not be answered. Files
    are written before anything is printed, since printing may fail; what a killed benchmark has
    answered is in OUTPUT.part."""
    questions = asked(settings)
    part = Path(settings.output + ".part")

    def done(responses):
        for r in responses[SHOWN:]:  # many long clips would fill the memory
            r.wave, r.sample.audio = None, []
        if settings.output and settings.benchmark:
            write_rows(part, questions, responses)

    responses = answer(model, questions, LISTEN[settings.listen], settings.batch,
                       settings.temperature, settings.seed, done)
    broken = [f"{name_of(q)}: {r.ended}" for q, r in zip(questions, responses)
              if not r.logprobs]
    if broken and not settings.benchmark:
        raise EchoError(broken[0])
    if settings.output:
        write_rows(settings.output, questions, responses)
        part.unlink(missing_ok=True)
    if settings.html:  # the first ones, since each carries its audio
        write_page(settings.html, "Echo listens again", "".join(
            trace_html(q, r) for q, r in zip(questions[:SHOWN], responses) if r.logprobs))
    remark(settings, questions)
    if settings.benchmark:
        metrics = measure(questions, responses, {q.category for q in questions})
        print("\n".join(f"{name:<24}{value:8.4g}" for name, value in metrics.items()))
    else:
        print_clip(questions[0], responses[0])
    if broken:
        print("\n".join([*broken, f"{len(broken)} of {len(questions)} can't be answered"]),
              file=sys.stderr)
    return 1 if broken else 0


# ==================================================================================================
# From here on: drawing. A reader of the method can stop.

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
body{margin:auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui,sans-serif}
.axis{display:flex;justify-content:space-between;font-size:.8rem;color:#777}
.loudness,.truth{position:relative}svg,audio{width:100%}
svg{height:8rem;display:block;overflow:visible}
.span{position:absolute;top:0;bottom:0;box-sizing:border-box;border:solid var(--c);
border-width:0 2px;background:color-mix(in srgb,var(--c) 27%,#0000)}
.truth{height:1.4rem;margin:.3rem 0;font-size:.8rem}
.truth div{position:absolute;background:#7773;overflow:hidden;white-space:nowrap;padding-left:.2rem}
.response,svg{background:#8881;border-radius:8px;stroke-width:2}
.response{padding:.8rem;overflow-wrap:anywhere;white-space:pre-wrap}
.chip{font:inherit;color:#777;border:1px dashed;border-radius:1rem;padding:0 .6rem}
button.chip{color:#fff;background:var(--c);border:0;cursor:pointer}
.big,.small{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));font-size:.8rem}
.small svg{height:4rem}.plot{display:flex;gap:.4rem}.plot svg{min-width:0}
.plot .axis{flex-direction:column}
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
    """A line through points (x, y), as high and as wide as its box."""
    xs, ys = zip(*points)
    low, high = min(0.0, *ys), max(0.0, *ys) or 1.0
    across = 300 / ((xs[-1] - xs[0]) or 1)
    at = " ".join(f"{across * (x - xs[0]):.1f},{100 * (high - y) / (high - low):.1f}"
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
    """Loudness with the spans that were heard, the true sounds below, player, response, answer."""
    wave = rollout.wave
    seconds, said = len(wave) / SAMPLE_RATE, extract_answer(rollout.text) or ""
    response, spans = response_html(rollout, seconds)
    verdict = "" if not q.answer else "right" if is_right(rollout.text, q) else "wrong"
    truth = "".join(
        f'<div style="left:{e["start_s"] / seconds:.2%};right:{1 - e["end_s"] / seconds:.2%}">'
        f'{escape(str(e.get("kind", "")))} {e.get("pulses", "")}</div>' for e in q.listen_to)
    if truth:
        truth = f'<div class="truth">{truth}</div><div class="axis">above: the true sounds</div>'
    ticks = "".join(f"<span>{seconds * i / 6:.1f} s</span>" for i in range(7))
    loudness = list(enumerate(F.adaptive_max_pool1d(wave.abs()[None], 600)[0].tolist()))
    sound = wav_bytes((wave / wave.abs().max().clamp_min(1)).numpy())  # a loud one, more quietly
    sound = base64.b64encode(sound).decode()
    return f"""<div class="clip"><div class="loudness">{line_svg(loudness)}{spans}</div>
<div class="axis">{ticks}</div>{truth}<audio controls src="data:audio/wav;base64,{sound}"></audio>
<p><b>{escape(q.question)}</b> {escape(", ".join(q.choices))}</p>
<div class="response">{response}</div>
<p>Answer: <b>{escape(said or "none")}</b> <b class="{verdict}">{verdict}</b><br>
Truth: {escape(q.answer or "not known")}<br>Ended: {rollout.ended}</p></div>"""


def chart(name, log):
    """A metric over the steps, with its axes."""
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    values = [y for _, y in points]
    high, low = max(*values, 0.0), min(*values, 0.0)
    return f"""<div><b>{escape(name)}</b>: first {values[0]:.3g}, last {values[-1]:.3g},
lowest {min(values):.3g}, highest {max(values):.3g}<div class="plot">
<div class="axis"><span>{high:.3g}</span><span>{low:.3g}</span></div>{line_svg(points)}</div>
<div class="axis"><span>step {points[0][0]}</span><span>step {points[-1][0]}</span></div></div>"""


def report_page(folder):
    """report.html in a run's folder: what RL changed, large, then all other metrics of its log."""
    folder = Path(folder)
    try:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        names = [name for name in dict.fromkeys(sum(map(list, log), [])) if name != "step"]
        held_out = "eval_" if "eval_accuracy" in names else ""
        large = [held_out + x for x in ("accuracy", "hits", "heard_s", "segments")] + ["reward"]
        large = [name for name in large if name in names]
        charts = {name: chart(name, log) for name in [*large, *names]}
        if not charts:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError):
        (folder / "report.html").unlink(missing_ok=True)  # an old one would look like this run's
        print(f"{folder / 'log.jsonl'}: empty, broken or gone, so there is no report",
              file=sys.stderr)
        return
    write_page(folder / "report.html", f"What {folder} learned", (
        '<p>eval_: held-out questions, greedy; else: the responses that were trained on. heard_s: '
        'mean seconds of a heard segment; sound_s: those of the sounds that it should hear.</p>'
        f'<div class="big">{"".join(charts.pop(name) for name in large)}</div>'
        f'<h2>All others</h2><div class="small">{"".join(charts.values())}</div>'))


def run():
    settings = parse_settings(Settings, __doc__)
    model = load(settings.model, pick_device())
    model.bf16 = settings.bf16
    set_limits(model, settings)
    return use(model, settings)


if __name__ == "__main__":
    main(run)
