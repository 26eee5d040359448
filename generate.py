"""Use a trained Echo: one clip, a benchmark file, or a picture of either.

    python generate.py                                                  # a held-out toy clip
    python generate.py clip.wav "How many pulses has the hum?" --choices two three four five
    python generate.py --benchmark data/test.jsonl --output runs/test.jsonl
    python generate.py --html trace.html                       # with any of these: a page of it
    python generate.py --report runs/rl --against runs/rl-text # how training went, as a page

Decoding is the very function that train_rl.py rolls out with. Left out: streaming audio in, several
questions in one conversation, sampling several answers and voting.
"""
import base64
import dataclasses
import json
import math
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
import torchaudio
from tqdm import tqdm

from echo import (AUDIO, DTYPES, INSERTS, REASONING, REASONS, EchoError, Question, Rollout, Sample,
                  Segment, ask, extract_answer, is_right, load, load_audio, main, parse_settings,
                  pick_device, read_questions, require, same_answer,
                  set_precision, set_trainable, split_segments, write_atomically)
from make_data import json_lines, wav_bytes


@dataclass
class Settings:
    clip: str = ""                   # a WAV file
    question: str = ""               # what to ask about it
    choices: tuple = ()              # the answers to choose from
    model: str = "runs/rl"           # checkpoint folder
    reasoning: str = "interleaved"   # or text: segments are written but not heard
    insert: str = "segment"          # controls: random (another place, same length) or silence
    temperature: float = 0.0         # 0: greedy, as in the README; the paper samples at 0.7
    max_new_tokens: int = 0          # sampled tokens at most; 0: the model's own limit
    seed: int = 0                    # of the draws, and of the random control
    device: str = "auto"             # cuda if there is one, else cpu
    dtype: str = "auto"              # fp32 or bf16; auto: bf16 for a pretrained decoder
    json: bool = False               # print one JSON object instead of the stream
    benchmark: str = ""              # a data file: toy, native, MMAR or MMAU rows
    output: str = ""                 # for the answered rows; an interrupted run goes on from it
    audio_root: str = ""             # audio paths are relative to it, or to the data file's folder
    batch: int = 50                  # questions decoded together
    limit: int = 0                   # only the first so many questions
    html: str = ""                   # write a page: a trace, or an index of a benchmark's traces
    report: str = ""                 # a run's folder: write its report.html
    against: str = ""                # another run, shown in the same charts
    POSITIONAL = ("clip", "question")


def answer(model, questions, waves, settings, first=0, **more):
    """Rollouts for some Questions, one each; `first` is the number of the first of them."""
    return ask(model, questions, waves, reasoning=settings.reasoning, insert=settings.insert,
               temperature=settings.temperature, max_new_tokens=settings.max_new_tokens,
               seeds=range(settings.seed + first, settings.seed + first + len(waves)), **more)


def trace(rollout):
    """The part of a Rollout that --json prints."""
    return {"answer": extract_answer(rollout.text), "response": rollout.text,
            "segments": [dataclasses.asdict(s) for s in rollout.segments], "ended": rollout.ended}


# ---------------------------------------------------------------------------------- evaluation

def evaluate(training, model, questions, batch=50, **decoding):
    """Greedy accuracy, by category too, and what was listened to; split over the processes."""
    mine, responses = questions[training.rank::training.world], []
    for at in tqdm(range(0, len(mine), batch), desc="evaluation", leave=False,
                   disable=training.rank > 0):
        some = mine[at:at + batch]
        waves = [load_audio(q.path, model.config.sample_rate) for q in some]
        responses += ask(model, some, waves, temperature=0.0, **decoding)
    metrics, right = {}, [is_right(r.text, q.answer) for q, r in zip(mine, responses)]
    for category in (None, *sorted({q.category for q in questions})):
        here = [ok for ok, q in zip(right, mine) if category in (None, q.category)]
        n_right, n = training.sum(sum(here), len(here))
        metrics[category or "accuracy"] = n_right / n
    metrics |= response_metrics(responses, training.sum)
    return {f"eval_{k}": v for k, v in metrics.items()}


def response_metrics(responses, total=lambda *counts: counts):
    """Shares and means over Rollouts; METRICS defines each. total: sums counts over processes."""
    n, heard = len(responses), [s for r in responses for s in r.heard]
    seconds = sum(s.end_s - s.start_s for s in heard)
    once = sum(covered(r.heard) for r in responses)
    reasons = [s.reason for r in responses for s in r.segments]
    computed = sum(r.computed for r in responses)
    parts = {"segments": (len(heard), n),
             "segment_s": (seconds, len(heard)),
             "short_segments": (sum(s.end_s - s.start_s < 0.4 for s in heard), len(heard)),
             "overlap": (seconds - once, seconds),
             "listened_once": (sum(len(r.heard) >= 1 for r in responses), n),
             "listened_twice": (sum(len(r.heard) >= 2 for r in responses), n),
             "truncated": (sum(r.ended == "length" for r in responses), n),
             "no_answer": (sum(extract_answer(r.text) is None for r in responses), n),
             "length": (sum(len(r.logprobs) for r in responses), n),
             "audio_tokens": (sum(r.sample.ids.count(AUDIO) for r in responses), n),
             "padding": (computed - sum(r.cached for r in responses), computed)}
    for reason in REASONS:
        parts["rejected_" + reason.replace(" ", "_")] = reasons.count(reason), len(reasons)
    tops, bottoms = total(*(a for a, _ in parts.values())), total(*(b for _, b in parts.values()))
    return {k: a / b if b else 0.0 for k, a, b in zip(parts, tops, bottoms)}


def covered(segments):
    """Seconds in the union of some segments."""
    total, end = 0.0, 0.0
    for s in sorted(segments, key=lambda s: s.start_s):
        total, end = total + max(0.0, s.end_s - max(end, s.start_s)), max(end, s.end_s)
    return total


# ---------------------------------------------------------------------------------- one clip

def answer_clip(model, settings):
    """Ask about one clip; stream the reasoning as it is written, and where it stops to listen."""
    q = Question({}, Path(settings.clip), settings.question, list(settings.choices), None, "")
    if not settings.clip:
        questions = read_questions("data/test.jsonl")
        q = next((q for q in questions if q.category == "count_after"), questions[0])
    elif not settings.question:
        raise EchoError('no question: python generate.py clip.wav "question" --choices a b c d')
    wave = load_audio(q.path, model.config.sample_rate)
    shown = 0

    def stream(row, segment):
        nonlocal shown
        print(row.text[shown:], end="", flush=True)
        shown = len(row.text)
        if segment:
            place = f"{segment.start_s:.2f} to {segment.end_s:.2f} s" if segment.heard else ""
            what = f"listens to {place}" if segment.heard else f"not heard: {segment.reason}"
            print(f" [{what}]", end="", flush=True)
    if not settings.json:
        seconds = len(wave) / model.config.sample_rate
        print(f"{q.path} ({seconds:.1f} s)\n{q.question} {', '.join(q.choices)}\n")
    began = time.time()
    rollout = answer(model, [q], [wave], settings, watch=None if settings.json else stream)[0]
    if settings.json:
        print(json.dumps(trace(rollout), ensure_ascii=False))
    else:
        said = extract_answer(rollout.text)
        said = "(none: no single <answer> block)" if said is None else said
        truth = f"   truth: {q.answer}" if q.answer else ""
        print(f"\n\nanswer: {said}{truth}   ({time.time() - began:.1f} s)")
    if settings.html:
        trace_page(settings.html, model, wave, q, rollout, settings)
        print(f"wrote {settings.html}", file=sys.stderr)


# ---------------------------------------------------------------------------------- a benchmark

def run_benchmark(model, settings):
    """Answer every row of a data file; returns the exit code, 1 if a row could not be answered.

    Each row is written back with all its fields, plus the answer's text alone as answer_prediction
    (read by MMAR's evaluator) and as model_output (by MMAU's), and the trace. What is done so far
    stands in OUTPUT.part; OUTPUT itself, in the format of the data file, appears whole at the end.
    """
    questions = read_questions(settings.benchmark, settings.audio_root, needs=())
    questions = questions[:settings.limit or None]
    part, done = open_part(settings, questions)
    for at in tqdm(range(len(done), len(questions), settings.batch), unit="batch",
                   desc=Path(settings.benchmark).name):
        rows = answer_batch(model, questions[at:at + settings.batch], settings, at)
        done += rows
        if part:
            with open(part, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))
    if part:
        with open(settings.benchmark, encoding="utf-8-sig") as file:
            as_list = file.read(4096).lstrip().startswith("[")
        text = json.dumps(done, ensure_ascii=False, indent=2) if as_list else json_lines(done)
        write_atomically(settings.output, text)
        part.unlink()
    if settings.html:
        index_page(settings.html, questions, done, model.config.sample_rate)
        print(f"wrote {settings.html}", file=sys.stderr)
    summary = summarise(questions, done)
    print(json.dumps(summary) if settings.json else readable(summary))
    broken = [str(r.get("id")) for r in done if "error" in r]
    if broken:
        print(f"{len(broken)} of {len(done)} rows can't be answered: {', '.join(broken[:5])}"
              + " ..." * (len(broken) > 5), file=sys.stderr)
    return 1 if broken else 0


def open_part(settings, questions):
    """The path of OUTPUT.part and the rows that an interrupted run left there; its first line holds
    the settings of that run."""
    if not settings.output:
        return None, []
    if Path(settings.output).is_dir():
        raise EchoError(f"--output {settings.output}: a folder; give the name of a file in it")
    part = Path(settings.output + ".part")
    run = json.loads(json.dumps(dataclasses.asdict(settings)))
    for free in ("json", "html", "device", "batch"):
        del run[free]
    done = []
    if part.is_file():
        whole = part.read_text(encoding="utf-8")
        lines = whole[:whole.rfind("\n") + 1].split("\n")[:-1]  # a half-written one is done again
        begun = json.loads(lines[0]) if lines else {}
        if begun != run:
            other = [k for k in run if begun.get(k) != run[k]]
            raise EchoError(f"{part}: left by a run with another {', '.join(other)}; give the same "
                            "flags, or delete it")
        done = [json.loads(line) for line in lines[1:]]
    write_atomically(part, json_lines([run, *done]))
    return part, done


def answer_batch(model, questions, settings, first):
    """The answered rows of the questions from number `first` on. One that can't be answered, its
    audio broken or its text too long, is found by halving the batch, and gets an empty prediction
    and the error."""
    began = time.time()
    try:
        waves = [load_audio(q.path, model.config.sample_rate) for q in questions]
        responses = answer(model, questions, waves, settings, first)
    except EchoError as error:
        half = len(questions) // 2
        if half:
            return (answer_batch(model, questions[:half], settings, first)
                    + answer_batch(model, questions[half:], settings, first + half))
        tqdm.write(f"row {questions[0].row.get('id')}: {error}")
        return [{**questions[0].row, "answer_prediction": "", "model_output": "", "response": "",
                 "segments": [], "ended": None, "seconds": 0.0, "error": str(error)}]
    seconds, rows = round((time.time() - began) / len(questions), 4), []
    for q, response in zip(questions, responses):
        said = trace(response)
        text = said.pop("answer") or ""
        rows.append({**q.row, "answer_prediction": text, "model_output": text, **said,
                     "seconds": seconds, "audio_tokens": response.sample.ids.count(AUDIO),
                     "length": len(response.logprobs)})
    return rows


def summarise(questions, rows):
    """Accuracy by category with a 95% interval (where the truth is known), listening, seconds."""
    summary = {"questions": len(rows)}
    if all(q.answer for q in questions):
        summary["accuracy"] = {}
        for name in ("all", *sorted({q.category for q in questions} - {"all"})):
            right = [same_answer(row["answer_prediction"], q.answer)
                     for q, row in zip(questions, rows) if name in ("all", q.category)]
            low, high = interval(sum(right), len(right))
            summary["accuracy"][name] = {"right": sum(right), "of": len(right), "low": low,
                                         "accuracy": sum(right) / len(right), "high": high}
    traces = [Rollout(Sample(), None, None, text=r["response"], ended=r["ended"],
                      segments=[Segment(**s) for s in r["segments"]]) for r in rows]
    summary |= response_metrics(traces)
    for key in ("seconds", "audio_tokens", "length"):
        summary[key] = sum(r.get(key, 0) for r in rows) / len(rows)
    del summary["padding"]
    return summary


def interval(right, n):
    """The Wilson 95% interval of a share, right of n."""
    p, z = right / n, 1.96
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def readable(summary):
    lines, s = [], summary
    for name, a in s.get("accuracy", {}).items():
        lines.append(f"{name:<14}{a['accuracy']:7.1%}   95%: {a['low']:.1%} to {a['high']:.1%}"
                     f"   ({a['right']} of {a['of']})")
    rejected = [f"{r} {s['rejected_' + r.replace(' ', '_')]:.1%}" for r in REASONS
                if s["rejected_" + r.replace(" ", "_")]]
    lines += [f"segments a response {s['segments']:.2f}   mean length {s['segment_s']:.2f} s"
              f"   overlap {s['overlap']:.2f}   under 0.4 s {s['short_segments']:.1%}",
              f"listened at least once {s['listened_once']:.1%}   twice {s['listened_twice']:.1%}",
              f"no answer {s['no_answer']:.1%}   truncated {s['truncated']:.1%}   rejected tags "
              f"{', '.join(rejected) or 'none'}",
              f"a question: {s['audio_tokens']:.0f} audio tokens, {s['length']:.0f} sampled, "
              f"{s['seconds']:.3f} s"]
    return "\n".join(lines)


# ==================================================================================================
# From here on: drawing. A reader of the method can stop.

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title><style>
:root{color-scheme:light dark;--soft:light-dark(#666,#a0a0a0);--line:#8884;--card:#8881}
body{margin:0 auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.5rem 0 .4rem}ul{padding-left:1.2rem}
.soft,.axis,.grid p{color:var(--soft)}.axis,.grid p{font-size:.8rem;margin:.2rem 0 0}
.spectrogram{position:relative}.spectrogram img{width:100%;height:12rem;display:block}
.span,.cursor{position:absolute;top:0;bottom:0;box-sizing:border-box}
.span{border:solid;border-width:0 2px}.cursor{width:1px;background:#fff}
.axis{display:flex;justify-content:space-between}audio{width:100%;margin:.4rem 0}
.response,svg{background:var(--card);border-radius:.5rem}
.response{padding:.8rem;overflow-wrap:anywhere;white-space:pre-wrap}
.chip{font:inherit;color:#fff;border:0;border-radius:1rem;padding:.05rem .6rem;cursor:pointer}
.rejected{color:var(--soft);border:1px dashed;cursor:default}
.right{color:#2f9e44}.wrong{color:#e03131}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
details{border-bottom:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}
</style>"""
SCRIPT = """<script>
for (const clip of document.querySelectorAll('.clip')) {
  const audio = clip.querySelector('audio'), cursor = clip.querySelector('.cursor');
  let stop = null;
  clip.addEventListener('click', e => {
    const chip = e.target.closest('[data-start]');
    if (chip) { audio.currentTime = +chip.dataset.start; stop = +chip.dataset.end; audio.play(); }
  });
  (function tick() {
    if (stop !== null && audio.currentTime >= stop) { audio.pause(); stop = null; }
    if (audio.duration) cursor.style.left = 100 * audio.currentTime / audio.duration + '%';
    requestAnimationFrame(tick);
  })();
}
const shown = (d, k) => ['', d.dataset[k]].includes(document.getElementById(k).value);
for (const select of document.querySelectorAll('select')) select.addEventListener('change', () => {
  for (const d of document.querySelectorAll('details'))
    d.hidden = !(shown(d, 'right') && shown(d, 'kind'));
});
</script>"""


def page(path, title, body):
    write_atomically(path, STYLE.replace("$title", escape(title)) + body + SCRIPT + "</html>")


def data_uri(kind, raw):
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def spectrogram_png(wave, sample_rate, columns=600):
    """A grey PNG of the log-mel power of a waveform, low pitches at the bottom."""
    wave = torch.nn.functional.pad(wave, (0, max(0, 1024 - len(wave))))
    hop = max(1, len(wave) // columns)
    mel = torchaudio.transforms.MelSpectrogram(sample_rate, 1024, hop_length=hop, n_mels=64)(wave)
    decades = mel.clamp_min(1e-8).log10() - mel.max().clamp_min(1e-8).log10()
    pixels = ((decades.clamp_min(-6) / 6 + 1).flip(0) * 255).byte().numpy()

    def chunk(name, raw):
        return struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def chart(series, x_label, width=520, height=190):
    """An SVG line chart; series: (name, colour, [(x, y), ...], dashed)."""
    points = [p for _, _, line, _ in series for p in line] or [(0, 0)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0 = min(xs), max(max(xs), min(xs) + 1), min(0.0, *ys)
    y1 = 1.0 if 0.5 < max(ys) <= 1 else max(ys) * 1.05 if max(ys) > 0 else 0.0 if y0 < 0 else 1.0
    left, right, top, bottom = 64, width - 10, 22, height - 24

    def at(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for y in (y0, (y0 + y1) / 2, y1):
        down = at(x0, y)[1]
        out.append(f'<path d="M{left} {down:.1f}H{right}" stroke="var(--line)"/>'
                   f'<text x="{left - 4}" y="{down + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    out.append(f'<text x="{left}" y="{height - 6}">{x0:g}</text><text x="{right}" y="{height - 6}" '
               f'text-anchor="end">{escape(x_label)} {x1:g}</text>')
    dashes = 'stroke-dasharray="5 4"'
    for i, (name, colour, line, dashed) in enumerate(series):
        d = "M" + "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in line) if line else ""
        out.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2" '
                   f'{dashes * dashed}/>'
                   f'<text x="{left + width // 3.4 * i:.0f}" y="13" style="fill:{colour}">'
                   f'{escape(name)}</text>')
    return "".join(out) + "</svg>"


def response_html(response, segments):
    """The response as it was written, a chip for every closed tag."""
    pairs, rest = split_segments(response)
    out = []
    for i, ((before, inside), s) in enumerate(zip(pairs, segments)):
        label = escape("</seg>" if inside is None else f"<seg>{inside}</seg>")
        out.append(escape(before))
        if s["heard"]:
            out.append(f'<button class="chip" style="background:{COLOURS[i % 8]}" '
                       f'title="play this part" data-start="{s["start_s"]}" '
                       f'data-end="{s["end_s"]}">&#9654; {label}</button>')
        else:
            out.append(f'<span class="chip rejected">{label} &#10007; {escape(s["reason"])}</span>')
    return "".join(out) + escape(rest)


def clip_html(wave, sample_rate, q, row):
    """Spectrogram with the segments' spans, player, response with its chips, answer and choices."""
    seconds, spans, items = len(wave) / sample_rate, "", ""
    for i, s in enumerate(row["segments"]):
        if s["heard"]:
            left, width = 100 * s["start_s"] / seconds, 100 * (s["end_s"] - s["start_s"]) / seconds
            spans += (f'<div class="span" data-start="{s["start_s"]}" data-end="{s["end_s"]}" '
                      f'style="border-color:{COLOURS[i % 8]};background:{COLOURS[i % 8]}44;'
                      f'left:{left:.2f}%;width:{width:.2f}%"></div>')
    said = row["answer"] or ""
    for c in q.choices:
        mark = " &larr; answer" if same_answer(c, said) else ""
        if q.answer and same_answer(c, q.answer):
            mark += ' <b class="right">&#10003; truth</b>'
        items += f"<li>{escape(c)}{mark}</li>"
    verdict = ""
    if q.answer:
        verdict = "right" if same_answer(said, q.answer) else "wrong"
    ticks = "".join(f"<span>{seconds * i / 6:.1f} s</span>" for i in range(7))
    picture = data_uri("image/png", spectrogram_png(wave, sample_rate))
    sound = data_uri("audio/wav", wav_bytes(wave.numpy().clip(-1, 1), sample_rate))
    return ('<div class="clip"><div class="spectrogram">'
            f'<img alt="spectrogram" src="{picture}">{spans}<div class="cursor"></div></div>'
            f'<div class="axis">{ticks}</div>'
            f'<audio controls src="{sound}"></audio><p><b>{escape(q.question)}</b></p>'
            f'<div class="response">{response_html(row["response"], row["segments"])}</div>'
            f'<p>Answer: <b>{escape(said or "none")}</b> <b class="{verdict}">{verdict}</b> '
            f'<span class="soft">ended: {row["ended"]}</span></p><ul>{items}</ul></div>')


@torch.no_grad()
def attention_shares(model, rollout):
    """The attention on audio tokens at each step of a response: (steps, 2), first listen and
    re-listened segments.

    Averaged over layers and heads; one uncached pass over the whole sequence gives all steps.
    """
    implementation = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("eager")  # the one that returns its weights
    ids, position, mask, audio = model.tensors([rollout.sample])
    x = model.embed(ids, audio)
    with model.autocast():
        weights = model.decoder.model(inputs_embeds=x, attention_mask=mask, position_ids=position,
                                      output_attentions=True).attentions
    model.decoder.set_attn_implementation(implementation)
    weights = torch.stack([w.float().mean(1) for w in weights]).mean(0)[0]  # (T, T)
    heard = (ids[0] == AUDIO).float()
    first = heard * (torch.arange(len(heard), device=heard.device) < rollout.n_prompt)
    steps = [t - 1 for t, trained in enumerate(rollout.sample.trained) if trained]
    return torch.stack([weights[steps] @ first, weights[steps] @ (heard - first)], 1).cpu()


def trace_page(path, model, wave, q, rollout, settings):
    """The page of one clip, with the attention on audio at each step, and that in text decoding."""
    text = dataclasses.replace(settings, reasoning="text", temperature=0.0)
    text_only = answer(model, [q], [wave], text)[0]
    shares, text_shares = (attention_shares(model, r) for r in (rollout, text_only))
    series = [("first listen", COLOURS[1], list(enumerate(shares[:, 0].tolist())), False),
              ("re-listened segments", COLOURS[0], list(enumerate(shares[:, 1].tolist())), False),
              ("text decoding", "#868e96", list(enumerate(text_shares[:, 0].tolist())), True)]
    late, text_late = (x[25:].sum(1).mean().nan_to_num() for x in (shares, text_shares))
    clip = clip_html(wave, model.config.sample_rate, q, trace(rollout))
    body = (f"<h1>Echo listens again</h1>{clip}"
            f"<h2>Attention on audio tokens at each decoding step</h2>{chart(series, 'step')}"
            f"<p class=soft>Mean over layers and heads. From step 25 on: {late:.1%} here, "
            f"{text_late:.1%} in the text decoding of the same question. The paper reports 10-14% "
            "interleaved and below 5% in text, for a model of 7 billion parameters.</p>")
    page(path, "Echo: a trace", body)


def index_page(path, questions, rows, sample_rate, limit=60):
    """Traces of a benchmark run, with filters; the first `limit`, since each carries its audio."""
    parts, kinds = [], sorted({q.category for q in questions})
    for q, row in [(q, r) for q, r in zip(questions, rows) if "error" not in r][:limit]:
        row = row | {"answer": row["answer_prediction"]}
        right = "" if not q.answer else "right" if same_answer(row["answer"], q.answer) else "wrong"
        wave = load_audio(q.path, sample_rate)
        parts.append(f'<details data-kind="{escape(q.category)}" data-right="{right}"><summary>'
                     f'<b class="{right}">{right}</b> {escape(str(q.row.get("id", "")))}: '
                     f'{escape(q.question)}</summary>'
                     f'{clip_html(wave, sample_rate, q, row)}</details>')
    options = "".join(f'<option value="{escape(k)}">{escape(k)}</option>' for k in kinds)
    page(path, "Echo: traces",
         f'<h1>{len(parts)} of {len(rows)} traces</h1><p><select id="right"><option value="">'
         "right and wrong</option><option>right</option><option>wrong</option></select> "
         f'<select id="kind"><option value="">all kinds</option>{options}</select></p>'
         + "".join(parts))


METRICS = {  # every metric of a log; eval_: on held-out clips, greedy
    "reward": "mean over responses of the sum of the four rewards, -0.5 to 1.5",
    "format": "0.5 if exactly one well-formed think block is followed by exactly one answer block",
    "consistency": "-0.1 for each </seg> before a capital, a tag or no word at all; at least -0.5",
    "accuracy": "0.5 if the answer is right (see REWARDS); eval_accuracy: the share of right ones",
    "segment": "0.5 if the answer is right and at least one segment was heard",
    "right": "share of responses with the right answer",
    "flat_groups": "share of groups whose rewards are all equal: their advantages are 0",
    "loss": "SFT: mean -log p of a trained token; GRPO: near 0 on-policy, advantages cancel out",
    "kl": "mean k3 of KL(policy, SFT policy) at a token of the update: exp(r - p) - (r - p) - 1",
    "clip_share": "share of sampled tokens whose clipped ratio was the smaller one",
    "entropy": "of the policy at a token, in nats, by the mean of -log p over the sampled ones",
    "logp_gap": "mean |log-prob at sampling - in the update|; fp32: above 1e-4 by mini-batch 2",
    "length": "sampled tokens a response, eos in, inserted audio out",
    "audio_tokens": "audio tokens a response, first listen and what was heard again",
    "padding": "share of the positions computed while decoding that were padding",
    "truncated": "share of responses that ended at the length limit",
    "no_answer": "share of responses from which no answer could be extracted",
    "segments": "segments heard a response",
    "segment_s": "mean length of the heard segments, seconds",
    "short_segments": "share of the heard segments shorter than 0.4 s",
    "overlap": "share of the heard seconds that the same response had heard before",
    "listened_once": "share of responses that heard at least one segment",
    "listened_twice": "share of responses that heard at least two",
    "responses_per_s": "responses a second over the whole step, decoding and updates",
    "tokens_per_s": "sampled tokens a second over the whole step",
    "decoding_share": "share of the time of a step spent in rollouts",
    "seconds": "of the whole step",
    "lr": "SFT: the learning rate",
    "count": "share of right answers to how many pulses X has: fine detail of one segment",
    "order": "share of right answers to which sound comes right after X: two places",
    "count_after": "share of right answers to how many pulses the sound right after X has: both",
    "place_loss": "SFT: of the first token of a time after <seg>, in nats: is the place known?",
    "rejected": "share of the closed tags that were not heard, by reason",
    "frames_loss": "encoder: detection loss of a token at the full rate, in nats",
    "frames_right": "encoder: share of the tokens at the full rate with the right kind of sound",
    "first_loss": "encoder: detection loss of a first-listen token",
    "first_right": "encoder: share of the first-listen tokens with the right kind of sound",
}


def plain_name(metric):
    """eval_right -> right, rejected_too_short -> rejected."""
    metric = metric.removeprefix("eval_")
    return "rejected" if metric.startswith("rejected_") else metric


def read_log(folder):
    if not (Path(folder) / "log.jsonl").is_file():
        raise EchoError(f"{folder}: no log.jsonl; give the folder of a run")
    lines = (Path(folder) / "log.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def report_page(folder, against=""):
    """report.html in a run's folder: a chart for each metric of its log, and of the runs before."""
    folder, begun = Path(folder), Path(folder) / "settings.json"
    parts = [("", [folder] + [Path(against)] * bool(against))]
    if begun.is_file() and (model := json.loads(begun.read_text()).get("model")):
        for stage in (Path(model), Path(model).parent / "base"):
            if (stage / "log.jsonl").is_file():
                parts.append((f"Before it: {stage.name}", [stage]))
    body = ""
    for title, runs in parts:
        logs, cards = [(run.name, read_log(run)) for run in runs], ""
        names = dict.fromkeys(k for _, log in logs for entry in log for k in entry)
        for name in names:
            series = []
            for i, (run, log) in enumerate(logs):
                line = [(entry["step"], entry[name]) for entry in log if name in entry]
                series.append((run, COLOURS[i], line, i > 0))
            if name != "step" and any(y for _, _, line, _ in series for _, y in line):
                meaning = METRICS.get(name) or METRICS.get(plain_name(name), "")
                cards += (f"<div><b>{escape(name)}</b>{chart(series, 'step', 320, 150)}"
                          f"<p>{escape(meaning)}</p></div>")
        body += f"<h2>{escape(title)}</h2>" * bool(title) + f'<div class="grid">{cards}</div>'
    runs = escape(" and ".join(run.name for run in parts[0][1]))
    page(folder / "report.html", f"Echo: {folder.name}", f"<h1>How {runs} learned</h1>{body}")


def run():
    settings = parse_settings(Settings, __doc__)
    require(settings, reasoning=REASONING, insert=INSERTS, dtype=DTYPES)
    if settings.report:
        report_page(settings.report, settings.against)
        return print(f"wrote {Path(settings.report) / 'report.html'}")
    model = load(settings.model, pick_device(settings.device))
    set_trainable(model, "none")
    set_precision(model, settings.dtype)
    if settings.benchmark:
        return run_benchmark(model, settings)
    return answer_clip(model, settings)


if __name__ == "__main__":
    main(run)
