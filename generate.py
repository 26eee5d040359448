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
import json
import struct
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import torch
import torchaudio
from tqdm import tqdm

from echo import (AUDIO, DTYPES, INSERTS, REASONING, REASONS, EchoError, Question, Rollout, Sample,
                  Segment, ask, extract_answer, is_right, load, load_audio, main, parse_settings,
                  pick_device, read_questions, require, same_answer, set_precision, set_trainable,
                  split_segments, write_atomically)
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


def answer(model, questions, waves, settings, first=0, watch=None):
    """Rollouts for some Questions, one each; `first` is the number of the first of them."""
    seeds = range(settings.seed + first, settings.seed + first + len(waves))
    return ask(model, questions, waves, reasoning=settings.reasoning, insert=settings.insert,
               temperature=settings.temperature, max_new_tokens=settings.max_new_tokens,
               seeds=seeds, watch=watch)


def trace(rollout):
    """What --json prints and a benchmark's row keeps of a Rollout, besides the answer."""
    return {"response": rollout.text, "segments": [asdict(s) for s in rollout.segments],
            "ended": rollout.ended}


# ---------------------------------------------------------------------------------- evaluation

def evaluate(training, model, questions, batch=50, **decoding):
    """Greedy accuracy, by category too, and what was listened to; split over the processes."""
    share = slice(training.rank, None, training.world)
    mine, seeds, responses, metrics = questions[share], range(len(questions))[share], [], {}
    for at in tqdm(range(0, len(mine), batch), desc="evaluation", leave=False,
                   disable=training.rank > 0):
        some = mine[at:at + batch]
        waves = [load_audio(q.path, model.config.sample_rate) for q in some]
        responses += ask(model, some, waves, temperature=0.0, seeds=seeds[at:at + batch],
                         **decoding)
    for name in ("accuracy", *sorted({q.category for q in questions})):
        right = [is_right(r.text, q.answer) for r, q in zip(responses, mine)
                 if name in ("accuracy", q.category)]
        n_right, n = training.sum(sum(right), len(right))
        metrics[name] = n_right / n
    metrics |= response_metrics(responses, training.sum)
    return {f"eval_{name}": value for name, value in metrics.items()}


def response_metrics(responses, total=lambda *counts: counts):
    """Shares and means over Rollouts; METRICS defines each. total: sums counts over processes."""
    n, reasons = len(responses), [s.reason for r in responses for s in r.segments]
    lengths = [s.end_s - s.start_s for r in responses for s in r.heard]
    once = sum(covered(r.heard) for r in responses)
    computed = sum(r.computed for r in responses)
    parts = {"segments": (len(lengths), n),
             "segment_s": (sum(lengths), len(lengths)),
             "short_segments": (sum(length < 0.4 for length in lengths), len(lengths)),
             "overlap": (sum(lengths) - once, sum(lengths)),
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
    if settings.choices and not settings.clip:
        raise EchoError('--choices without a clip; they come last: generate.py clip.wav "question" '
                        "--choices a b c d")
    if not settings.clip:
        questions = read_questions("data/test.jsonl")
        q = next((q for q in questions if q.category == "count_after"), questions[0])
    elif not settings.question:
        raise EchoError('no question: python generate.py clip.wav "question" --choices a b c d')
    wave = load_audio(q.path, model.config.sample_rate)
    shown, began = 0, time.time()

    def stream(row, segment):
        nonlocal shown
        text, shown = row.text[shown:], len(row.text)
        if segment and segment.heard:
            text += f" [listens to {segment.start_s:.2f} to {segment.end_s:.2f} s]"
        elif segment:
            text += f" [not heard: {segment.reason}]"
        print(text, end="", flush=True)
    if not settings.json:
        print(f"{q.path} ({len(wave) / model.config.sample_rate:.1f} s)\n"
              f"{q.question} {', '.join(q.choices)}\n")
    rollout = answer(model, [q], [wave], settings, watch=None if settings.json else stream)[0]
    said = extract_answer(rollout.text)
    if settings.json:
        print(json.dumps({"answer": said, **trace(rollout)}, ensure_ascii=False))
    else:
        said = "(none: no single <answer> block)" if said is None else said
        truth = f"   truth: {q.answer}" if q.answer else ""
        print(f"\n\nanswer: {said}{truth}   ({time.time() - began:.1f} s)")
    if settings.html:
        trace_page(settings.html, model, wave, q, rollout, settings)


# ---------------------------------------------------------------------------------- a benchmark

def run_benchmark(model, settings):
    """Answer every row of a data file; returns the exit code, 1 if a row could not be answered.

    Each row is written back with all its fields, plus the answer's text alone as answer_prediction
    (read by MMAR's evaluator) and as model_output (by MMAU's), and the trace. What is done so far
    stands in OUTPUT.part; OUTPUT itself, in the format of the data file, appears whole at the end.
    """
    questions = read_questions(settings.benchmark, settings.audio_root, needs=())
    questions = questions[:settings.limit or None]
    part, done = open_part(settings) if settings.output else (None, [])
    for at in tqdm(range(len(done), len(questions), settings.batch), unit="batch",
                   desc=Path(settings.benchmark).name):
        rows = answer_batch(model, questions[at:at + settings.batch], settings, at)
        done += rows
        if part:
            with open(part, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))
    if part:
        text = json_lines(done)
        if Path(settings.benchmark).read_text(encoding="utf-8-sig").lstrip().startswith("["):
            text = json.dumps(done, ensure_ascii=False, indent=2)
        write_atomically(settings.output, text)
        part.unlink()
    if settings.html:
        index_page(settings.html, questions, done, model.config.sample_rate)
    summary = summarise(questions, done)
    print(json.dumps(summary) if settings.json else readable(summary))
    broken = [str(row.get("id")) for row in done if "error" in row]
    if broken:
        some = ", ".join(broken[:5] + ["..."] * (len(broken) > 5))
        print(f"{len(broken)} of {len(done)} rows can't be answered: {some}", file=sys.stderr)
    return 1 if broken else 0


def open_part(settings):
    """The path of OUTPUT.part, and the rows in it; its first line holds the run's settings."""
    if Path(settings.output).is_dir():
        raise EchoError(f"--output {settings.output}: a folder; give the name of a file in it")
    part, done = Path(settings.output + ".part"), []
    run = {k: getattr(settings, k) for k in (
        "model", "reasoning", "insert", "temperature", "max_new_tokens", "seed", "dtype",
        "benchmark", "audio_root", "limit")}
    if part.is_file():
        whole = part.read_text(encoding="utf-8", errors="replace")
        lines = whole.split("\n")[:-1]  # a half-written one is done again
        begun, *done = [json.loads(line) for line in lines] or [{}]
        other = [k for k in run if begun.get(k) != run[k]]
        if other:
            raise EchoError(f"{part}: left by a run with another {', '.join(other)}; give the same "
                            "flags, or delete it")
    write_atomically(part, json_lines([run, *done]))
    return part, done


def answer_batch(model, questions, settings, first):
    """The answered rows of the questions from number `first` on. One that can't be answered (broken
    audio, too long a text) is found by halving the batch, and gets an empty response and the error.
    """
    began, rows, problem = time.time(), [], {}
    try:
        waves = [load_audio(q.path, model.config.sample_rate) for q in questions]
        responses = answer(model, questions, waves, settings, first)
    except EchoError as error:
        half = len(questions) // 2
        if half:
            return (answer_batch(model, questions[:half], settings, first)
                    + answer_batch(model, questions[half:], settings, first + half))
        tqdm.write(f"row {questions[0].row.get('id')}: {error}")
        responses, problem = [Rollout(Sample(), None, None)], {"error": str(error)}
    seconds = round((time.time() - began) / len(questions), 4)
    for q, response in zip(questions, responses):
        said = extract_answer(response.text) or ""
        q.row.pop("error", None)  # of an earlier run on this very output
        rows.append({**q.row, "answer_prediction": said, "model_output": said, **trace(response),
                     "seconds": seconds, "audio_tokens": response.sample.ids.count(AUDIO),
                     "length": len(response.logprobs), **problem})
    return rows


def rollout_of(row):
    """The Rollout that an answered row tells of, without its ids."""
    segments = [Segment(**s) for s in row["segments"]]
    return Rollout(Sample(), None, None, text=row["response"], segments=segments,
                   ended=row["ended"])


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
    summary |= response_metrics([rollout_of(row) for row in rows])
    for key in ("seconds", "audio_tokens", "length"):
        summary[key] = sum(row[key] for row in rows) / len(rows)
    del summary["padding"]
    return summary


def interval(right, n):
    """The Wilson 95% interval of a share, right of n."""
    p, z = right / n, 1.96
    middle = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def readable(summary):
    text, rejected = "", []
    for name, a in summary.get("accuracy", {}).items():
        text += (f"{name:<14}{a['accuracy']:7.1%}   95%: {a['low']:.1%} to {a['high']:.1%}"
                 f"   ({a['right']} of {a['of']})\n")
    for reason in REASONS:
        share = summary["rejected_" + reason.replace(" ", "_")]
        if share:
            rejected.append(f"{reason} {share:.1%}")
    return text + """\
segments a response {segments:.2f}   mean length {segment_s:.2f} s   overlap {overlap:.2f}   \
under 0.4 s {short_segments:.1%}
listened at least once {listened_once:.1%}   twice {listened_twice:.1%}
no answer {no_answer:.1%}   truncated {truncated:.1%}   rejected tags {rejected}
a question: {audio_tokens:.0f} audio tokens, {length:.0f} sampled, {seconds:.3f} s""".format(
        rejected=", ".join(rejected) or "none", **summary)


# ==================================================================================================
# From here on: drawing. A reader of the method can stop.

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{color-scheme:light dark;--soft:light-dark(#666,#a0a0a0)}h1{font-size:1.3rem}h2{font-size:1rem}
body{margin:auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui,sans-serif}
.soft,.axis,.grid p{color:var(--soft)}.axis,.grid p{font-size:.8rem;margin:0}
.spectrogram{position:relative}img{width:100%;height:12rem;display:block}audio{width:100%}
.span,.cursor{position:absolute;top:0;bottom:0;box-sizing:border-box;border:solid var(--c,#fff)}
.span{border-width:0 2px;background:color-mix(in srgb,var(--c) 27%,#0000)}
.cursor{border-width:0 0 0 1px}.axis{display:flex;justify-content:space-between}
.response,svg{background:#8881;border-radius:8px}svg text{fill:var(--soft);font-size:11px}
.response{padding:.8rem;overflow-wrap:anywhere;white-space:pre-wrap}
.chip{font:inherit;color:var(--soft);border:1px dashed;border-radius:1rem;padding:0 .6rem}
button.chip{color:#fff;background:var(--c);border:0;cursor:pointer}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
details{border-bottom:1px solid #8884;padding:.4rem 0}.right{color:#2f9e44}.wrong{color:#e03131}
</style>"""
SCRIPT = """<script>
for (const clip of document.querySelectorAll('.clip')) {
  const audio = clip.querySelector('audio'), cursor = clip.querySelector('.cursor');
  let end = Infinity;
  clip.onclick = event => {
    const part = event.target.closest('[data-start]');
    if (part) { audio.currentTime = part.dataset.start; end = +part.dataset.end; audio.play(); }
  };
  setInterval(() => {
    if (audio.currentTime >= end) { audio.pause(); end = Infinity; }
    cursor.style.left = 100 * audio.currentTime / audio.duration + '%';
  }, 20);
}
const filters = [...document.querySelectorAll('select')];
for (const filter of filters) filter.onchange = () => {
  for (const row of document.querySelectorAll('details'))
    row.hidden = filters.some(f => f.value && f.value !== row.dataset[f.id]);
};
</script>"""


def page(path, title, body):
    write_atomically(path, f"{STYLE}<title>{escape(title)}</title>{body}{SCRIPT}")


def spectrogram_png(wave, sample_rate):
    """A grey PNG of the log-mel power of a waveform, 60 dB, low pitches at the bottom."""
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate, 1024, hop_length=max(1, len(wave) // 600), n_mels=64, pad_mode="constant")
    db = torchaudio.transforms.AmplitudeToDB(top_db=60)(mel(wave))
    pixels = (((db - db.max()) / 60 + 1).flip(0) * 255).byte().numpy()

    def chunk(name, raw):
        return struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def chart(series, x_label, width=520, height=190):
    """An SVG line chart; series: (name, colour, [(x, y), ...], dashed)."""
    points = [point for _, _, line, _ in series for point in line] or [(0, 0)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(0.0, *ys), max(0.0, *ys)
    if 0.5 < y1 < 1 or y0 == y1:  # a share, or nothing
        y1 = 1.0
    left, right, top, bottom = 64, width - 10, 22, height - 24
    out = (f'<svg viewBox="0 0 {width} {height}" role="img"><text x="{left}" y="{height - 6}">'
           f'{x0:g}</text><text x="{right}" y="{height - 6}" text-anchor="end">'
           f'{escape(x_label)} {x1:g}</text>')
    for y, down in ((y0, bottom), ((y0 + y1) / 2, (bottom + top) / 2), (y1, top)):
        out += (f'<path d="M{left} {down}H{right}" stroke="#8884"/>'
                f'<text x="{left - 4}" y="{down + 4}" text-anchor="end">{y:.3g}</text>')
    across, up = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
    for i, (name, colour, line, dashed) in enumerate(series):
        at = " ".join(f"{left + across * (x - x0):.1f},{bottom - up * (y - y0):.1f}"
                      for x, y in line)
        out += (f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="2" '
                f'stroke-dasharray="{"5 4" if dashed else "none"}"/><text style="fill:{colour}" '
                f'x="{left + width // 3.4 * i:.0f}" y="13">{escape(name)}</text>')
    return out + "</svg>"


def response_html(rollout, seconds):
    """The response, a chip for every closed tag; and spans of the clip for what was heard."""
    pairs, rest = split_segments(rollout.text)
    response, spans = "", ""
    for i, ((before, inside), s) in enumerate(zip(pairs, rollout.segments)):
        tag = escape("</seg>" if inside is None else f"<seg>{inside}</seg>")
        if not s.heard:
            chip = f'<span class="chip">{tag} &#10007; {escape(s.reason)}</span>'
        else:
            part = (f'data-start="{s.start_s}" data-end="{s.end_s}" style="--c:{COLOURS[i % 8]};'
                    f'left:{s.start_s / seconds:.2%};right:{1 - s.end_s / seconds:.2%}"')
            chip = f'<button class="chip" {part} title="play this part">&#9654; {tag}</button>'
            spans += f'<div class="span" {part}></div>'  # left and right don't move the chip
        response += escape(before) + chip
    return response + escape(rest), spans


def verdict(q, said):
    """right or wrong; nothing where the truth is not known."""
    if not q.answer:
        return ""
    return "right" if same_answer(said, q.answer) else "wrong"


def clip_html(wave, sample_rate, q, rollout):
    """Spectrogram with the segments' spans, player, response with its chips, answer and choices."""
    seconds, said, choices = len(wave) / sample_rate, extract_answer(rollout.text) or "", ""
    response, spans = response_html(rollout, seconds)
    for choice in q.choices:
        mark = " &larr; answer" if same_answer(choice, said) else ""
        if verdict(q, choice) == "right":
            mark += ' <b class="right">&#10003; truth</b>'
        choices += f"<li>{escape(choice)}{mark}</li>"
    right = verdict(q, said)
    ticks = "".join(f"<span>{seconds * i / 6:.1f} s</span>" for i in range(7))
    picture = base64.b64encode(spectrogram_png(wave, sample_rate)).decode()
    sound = base64.b64encode(wav_bytes(wave.numpy().clip(-1, 1), sample_rate)).decode()
    return f"""<div class="clip"><div class="spectrogram">
<img alt="spectrogram" src="data:image/png;base64,{picture}">{spans}<div class="cursor"></div></div>
<div class="axis">{ticks}</div><audio controls src="data:audio/wav;base64,{sound}"></audio>
<p><b>{escape(q.question)}</b></p><div class="response">{response}</div>
<p>Answer: <b>{escape(said or "none")}</b> <b class="{right}">{right}</b>
<span class="soft">ended: {rollout.ended}</span></p><ul>{choices}</ul></div>"""


@torch.no_grad()
def attention_shares(model, rollout):
    """The attention on audio tokens at each step of a response: (steps, 2), first listen and
    re-listened segments. One uncached pass gives all steps; mean over layers and heads."""
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
    text = replace(settings, reasoning="text", temperature=0.0)
    text_only = answer(model, [q], [wave], text)[0]
    shares, text_shares = (attention_shares(model, r) for r in (rollout, text_only))
    series = [("first listen", COLOURS[1], list(enumerate(shares[:, 0].tolist())), False),
              ("re-listened segments", COLOURS[0], list(enumerate(shares[:, 1].tolist())), False),
              ("text decoding", "#868e96", list(enumerate(text_shares[:, 0].tolist())), True)]
    late, text_late = (x[25:].sum(1).mean().nan_to_num() for x in (shares, text_shares))
    page(path, "Echo: a trace", f"""<h1>Echo listens again</h1>
{clip_html(wave, model.config.sample_rate, q, rollout)}
<h2>Attention on audio tokens at each decoding step</h2>{chart(series, "step")}
<p class="soft">Mean over layers and heads. From step 25 on: {late:.1%} here, {text_late:.1%} in the
text decoding of the same question. The paper reports 10-14% interleaved and below 5% in text, for a
model of 7 billion parameters.</p>""")


def index_page(path, questions, rows, sample_rate, limit=60):
    """Traces of a benchmark run, with filters; the first `limit`, since each carries its audio."""
    answered = [(q, row) for q, row in zip(questions, rows) if "error" not in row][:limit]
    body, kinds = f"<h1>{len(answered)} of {len(rows)} traces</h1>", {q.category for q in questions}
    for key, every, values in (("right", "right and wrong", ("right", "wrong")),
                               ("kind", "all kinds", sorted(kinds))):
        options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
        body += f'<select id="{key}"><option value="">{every}</option>{options}</select> '
    for q, row in answered:
        right = verdict(q, row["answer_prediction"])
        clip = clip_html(load_audio(q.path, sample_rate), sample_rate, q, rollout_of(row))
        body += (f'<details data-kind="{escape(q.category)}" data-right="{right}"><summary>'
                 f'<b class="{right}">{right}</b> {escape(str(q.row.get("id", "")))}: '
                 f'{escape(q.question)}</summary>{clip}</details>')
    page(path, "Echo: traces", body)


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


def charts(runs):
    """A chart for each metric that is not always 0 in the logs of some runs."""
    logs, cards = [], ""
    for run in runs:
        if not (run / "log.jsonl").is_file():
            raise EchoError(f"{run}: no log.jsonl; give the folder of a run")
        lines = (run / "log.jsonl").read_text().split("\n")
        logs.append([json.loads(line) for line in lines if line.endswith("}")])
    for name in dict.fromkeys(k for log in logs for entry in log for k in entry if k != "step"):
        series = []
        for i, (run, log) in enumerate(zip(runs, logs)):
            line = [(entry["step"], entry[name]) for entry in log if name in entry]
            series.append((run.name, COLOURS[i], line, i > 0))
        if any(y for _, _, line, _ in series for _, y in line):
            cards += (f"<div><b>{escape(name)}</b>{chart(series, 'step', 320, 150)}"
                      f"<p>{escape(METRICS.get(plain_name(name), ''))}</p></div>")
    return f'<div class="grid">{cards}</div>'


def report_page(folder, against=""):
    """report.html in a run's folder: a chart for each metric of its log, and of the runs before."""
    folder, begun = Path(folder), Path(folder) / "settings.json"
    runs = [folder, Path(against)] if against else [folder]
    names = escape(" and ".join(run.name for run in runs))
    body = f"<h1>How {names} learned</h1>{charts(runs)}"
    model = json.loads(begun.read_text()).get("model") if begun.is_file() else None
    for stage in (Path(model), Path(model).parent / "base") if model else ():
        if (stage / "log.jsonl").is_file():
            body += f"<h2>Before it: {escape(stage.name)}</h2>{charts([stage])}"
    page(folder / "report.html", f"Echo: {folder.name}", body)


def run():
    settings = parse_settings(Settings, __doc__)
    require(settings, reasoning=REASONING, insert=INSERTS, dtype=DTYPES)
    for flag, needs in (("output", "benchmark"), ("limit", "benchmark"), ("against", "report")):
        if getattr(settings, flag) and not getattr(settings, needs):
            raise EchoError(f"--{flag}: needs --{needs}")
    if settings.report:
        report_page(settings.report, settings.against)
        return print(f"wrote {Path(settings.report) / 'report.html'}")
    model = load(settings.model, pick_device(settings.device))
    set_trainable(model, "none")
    set_precision(model, settings.dtype)
    code = run_benchmark(model, settings) if settings.benchmark else answer_clip(model, settings)
    if settings.html:
        print(f"wrote {settings.html}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main(run)
