"""Use a trained Echo: one clip, a benchmark file, or a picture of either.

    python generate.py                                                  # a held-out toy clip
    python generate.py clip.wav "How many pulses has the hum?" --choices two three four five
    python generate.py --benchmark data/test.jsonl --output runs/test.jsonl
    python generate.py --html trace.html                                # with any of these: a page that shows it
    python generate.py --report runs/rl --against runs/rl-text          # how training went, as a page

Decoding is the very function that train_rl.py rolls out with. Left out: streaming audio in, batching over clips of
one conversation, sampling several answers and voting.
"""
import base64
import json
import re
import struct
import sys
import time
import zlib
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torchaudio
from tqdm import tqdm

from echo import (INSERTS, EchoError, Rollout, Segment, attention_shares, extract_answer, interval, listening, load,
                  load_audio, main, parse_settings, pick_device, read_questions, rollouts, same_answer, wav_bytes,
                  write_atomically)


@dataclass
class Settings:
    clip: str | None = None          # a WAV file
    question: str | None = None      # what to ask about it
    choices: list[str] = field(default_factory=list)  # the answers to choose from
    model: str = "runs/rl"           # checkpoint folder
    reasoning: str = "interleaved"   # or text: segments are written but not heard
    insert: str = "segment"          # controls: random (another segment of the same length) or silence
    temperature: float = 0.0         # 0: greedy, as in the README's tables; the paper samples at 0.7
    max_new_tokens: int = 120        # sampled tokens at most
    seed: int = 0                    # of the draws, and of the random control
    device: str = "auto"             # cuda if there is one, else cpu
    json: bool = False               # print one JSON object instead of the stream
    benchmark: str | None = None     # a data file: toy, native, MMAR or MMAU rows
    output: str | None = None        # where the answered rows go; an interrupted run goes on from what is there
    audio_root: str | None = None    # audio paths are relative to this folder; none: to the data file's
    batch: int = 50                  # questions decoded together
    limit: int | None = None         # only the first so many questions
    html: str | None = None          # write a page: the trace of a clip, or an index of a benchmark's traces
    report: str | None = None        # a run's folder: write its report.html
    against: str | None = None       # another run, shown in the same charts
    POSITIONAL = ("clip", "question")


def answer(model, questions, waves, settings, watch=None):
    """Rollouts for some (question, choices), one each."""
    prompts = [model.prompt(w, text, choices) for w, (text, choices) in zip(waves, questions)]
    return rollouts(model, prompts, waves, 1, settings.reasoning, settings.temperature, settings.max_new_tokens,
                    settings.insert, range(settings.seed, settings.seed + len(waves)), watch)


def trace(rollout):
    """The part of a Rollout that --json prints."""
    segments = [{"text": s.text, "start_s": s.start_s, "end_s": s.end_s, "heard": s.heard, "reason": s.reason}
                for s in rollout.segments]
    return {"answer": extract_answer(rollout.text), "response": rollout.text, "segments": segments, "ended": rollout.ended}


# ---------------------------------------------------------------------------------------------- one clip

def answer_clip(model, settings):
    """Ask about one clip; stream the reasoning as it is written and show where it stops to listen."""
    truth, path, text, choices = None, settings.clip, settings.question, settings.choices
    if not path:
        q = next(q for q in read_questions("data/test.jsonl") if q.category == "count_after")
        truth, path, text, choices = q.answer, q.path, q.question, q.choices
    elif not text:
        raise EchoError('no question: python generate.py clip.wav "question" --choices a b c d')
    wave = load_audio(path, model.config.sample_rate)
    written = []

    def stream(row, token, segment):
        before = model.tokenizer.decode(written)
        if token not in model.eos_ids:
            written.append(token)
        print(model.tokenizer.decode(written)[len(before):], end="", flush=True)
        if segment:
            what = f"listens to {segment.start_s:.2f} to {segment.end_s:.2f} s" if segment.heard else f"not heard: {segment.reason}"
            print(f" [{what}]", end="", flush=True)
    if not settings.json:
        print(f"{path} ({len(wave) / model.config.sample_rate:.1f} s)\n{text} {', '.join(choices)}\n")
    began = time.time()
    rollout = answer(model, [(text, choices)], [wave], settings, None if settings.json else stream)[0]
    if settings.json:
        print(json.dumps(trace(rollout), ensure_ascii=False))
    else:
        said = extract_answer(rollout.text)
        print(f"\n\nanswer: {said if said is not None else '(none: no single <answer> block)'}"
              + (f"   truth: {truth}" if truth else "") + f"   ({time.time() - began:.1f} s)")
    if settings.html:
        trace_page(settings.html, model, wave, text, choices, truth, rollout, settings)
        print(f"wrote {settings.html}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- a benchmark

def run_benchmark(model, settings):
    """Answer every row of a data file; returns the exit code, 1 if the audio of a row was missing or broken.

    Each row is written back with all its fields, plus answer_prediction (read by MMAR's evaluator) and model_output
    (by MMAU's), the answer's text alone, and the trace. What is done so far stands in OUTPUT.part, so an interrupted
    run goes on; OUTPUT itself, in the format of the data file, appears whole at the end.
    """
    questions = read_questions(settings.benchmark, settings.audio_root, needs=())[:settings.limit]
    part, done = open_part(settings, questions)
    for at in tqdm(range(len(done), len(questions), settings.batch), desc=Path(settings.benchmark).name, unit="batch"):
        rows = answer_batch(model, questions[at:at + settings.batch], settings)
        done += rows
        if part:
            with open(part, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if part:
        as_list = Path(settings.benchmark).read_text(encoding="utf-8").lstrip().startswith("[")
        text = json.dumps(done, ensure_ascii=False, indent=2) if as_list else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in done)
        write_atomically(settings.output, text)
        part.unlink()
    if settings.html:
        index_page(settings.html, questions, done, model.config.sample_rate)
        print(f"wrote {settings.html}", file=sys.stderr)
    summary = summarise(questions, done)
    print(json.dumps(summary) if settings.json else readable(summary))
    broken = [r for r in done if "error" in r]
    if broken:
        print(f"{len(broken)} of {len(done)} rows have no usable audio: {', '.join(str(r.get('id')) for r in broken[:5])}"
              + (" ..." if len(broken) > 5 else ""), file=sys.stderr)
    return 1 if broken else 0


def open_part(settings, questions):
    """The path of OUTPUT.part and the rows that an interrupted run left there; its first line says which run it was."""
    if not settings.output:
        return None, []
    part = Path(settings.output + ".part")
    run = {k: str(getattr(settings, k)) for k in ("benchmark", "model", "reasoning", "insert", "temperature", "seed", "limit")}
    done = []
    if part.is_file():
        whole = part.read_text(encoding="utf-8")
        lines = whole[:whole.rfind("\n") + 1].splitlines()       # a half-written last line is answered again
        if not lines or json.loads(lines[0]) != run:
            raise EchoError(f"{part}: left by a run with other settings; give the same flags, or delete it")
        done = [json.loads(line) for line in lines[1:]][:len(questions)]
    write_atomically(part, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in [run, *done]))
    return part, done


def answer_batch(model, questions, settings):
    """The answered rows of some questions; a row whose audio can't be read gets an empty prediction and its error."""
    waves, errors = [], []
    for q in questions:
        try:
            waves.append(load_audio(q.path, model.config.sample_rate))
            errors.append(None)
        except EchoError as error:
            tqdm.write(f"row {q.row.get('id')}: {error}")
            errors.append(str(error))
    began = time.time()
    asked = [(q.question, q.choices) for q, e in zip(questions, errors) if e is None]
    rolled = iter(answer(model, asked, waves, settings) if asked else ())
    seconds = (time.time() - began) / max(1, len(asked))
    rows = []
    for q, error in zip(questions, errors):
        t = {"answer": None, "response": "", "segments": [], "ended": None, "error": error} if error else trace(next(rolled))
        said = t.pop("answer")
        rows.append({**q.row, "answer_prediction": said or "", "model_output": said or "", **t,
                     "seconds": round(seconds, 4)})
    return rows


def summarise(questions, rows):
    """Accuracy by category with a 95% interval (where the truth is known), listening, and seconds a question."""
    summary = {"questions": len(rows)}
    groups = {"all": range(len(rows))} | {c: [i for i, q in enumerate(questions) if q.category == c]
                                          for c in sorted({q.category for q in questions})}
    if all(q.answer for q in questions):
        for name, members in groups.items():
            right = sum(same_answer(rows[i]["answer_prediction"], questions[i].answer) for i in members)
            low, high = interval(right, len(members))
            summary.setdefault("accuracy", {})[name] = {"right": right, "of": len(members), "accuracy": right / len(members),
                                                        "low": low, "high": high}
    traces = [Rollout(None, None, 0, [], [Segment(**s) for s in r["segments"]], r["ended"], r["response"]) for r in rows]
    stats = listening(traces)
    stats.pop("length")
    return summary | stats | {"seconds": sum(r["seconds"] for r in rows) / len(rows)}


def readable(summary):
    lines = [f"{name:<14}{a['accuracy']:7.1%}   95%: {a['low']:.1%} to {a['high']:.1%}   ({a['right']} of {a['of']})"
             for name, a in summary.get("accuracy", {}).items()]
    s = summary
    lines += [f"segments a response {s['segments']:.2f}   mean length {s['segment_s']:.2f} s   overlap {s['overlap']:.2f}",
              f"listened at least once {s['listened_once']:.1%}   twice {s['listened_twice']:.1%}",
              f"no answer {s['no_answer']:.1%}   truncated {s['truncated']:.1%}   "
              f"rejected tags {', '.join(f'{k} {v:.1%}' for k, v in s['rejected'].items()) or 'none'}",
              f"{s['seconds']:.3f} s a question"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- pages
# From here on: drawing. A reader of the method can stop.

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root{color-scheme:light dark;--fg:#1a1a1a;--bg:#fff;--soft:#666;--line:#ddd;--card:#f6f6f4}
@media(prefers-color-scheme:dark){:root{--fg:#e8e8e6;--bg:#161616;--soft:#a0a0a0;--line:#3a3a3a;--card:#212121}}
body{margin:0 auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.5rem 0 .4rem}small,.soft{color:var(--soft)}a{color:inherit}
.spectrogram{position:relative;margin:.5rem 0 0}.spectrogram img{width:100%;height:12rem;display:block;image-rendering:pixelated}
.span{position:absolute;top:0;bottom:0;border:2px solid;border-width:0 2px;opacity:.9}.cursor{position:absolute;top:0;bottom:0;width:1px;background:#fff}
.axis{display:flex;justify-content:space-between;font-size:.75rem;color:var(--soft)}audio{width:100%;margin:.4rem 0}
.response{background:var(--card);padding:.8rem;border-radius:.5rem;overflow-wrap:anywhere;white-space:pre-wrap}
.chip{font:inherit;color:#fff;border:0;border-radius:1rem;padding:.05rem .6rem;cursor:pointer}.rejected{background:none;color:var(--soft);border:1px dashed var(--soft);cursor:default}
.right{color:#2f9e44}.wrong{color:#e03131}ul{padding-left:1.2rem}svg{width:100%;height:auto;background:var(--card);border-radius:.5rem}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.grid p{margin:.2rem 0 0;font-size:.8rem;color:var(--soft)}details{border-bottom:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}
</style>"""
SCRIPT = """<script>
for (const clip of document.querySelectorAll('.clip')) {
  const audio = clip.querySelector('audio'), cursor = clip.querySelector('.cursor'); let stop = null;
  clip.addEventListener('click', e => { const chip = e.target.closest('[data-start]'); if (!chip) return;
    audio.currentTime = +chip.dataset.start; stop = +chip.dataset.end; audio.play(); });
  (function tick() { if (stop !== null && audio.currentTime >= stop) { audio.pause(); stop = null; }
    if (audio.duration) cursor.style.left = 100 * audio.currentTime / audio.duration + '%'; requestAnimationFrame(tick); })();
}
const pick = () => document.querySelectorAll('details[data-kind]').forEach(d => {
  d.hidden = !['right', 'kind'].every(k => { const v = document.getElementById(k).value; return !v || d.dataset[k] === v; }); });
document.querySelectorAll('select').forEach(s => s.addEventListener('change', pick));
</script>"""


def page(path, title, body):
    write_atomically(path, STYLE.replace("$title", escape(title)) + body + SCRIPT + "</html>")


def data_uri(kind, raw):
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def spectrogram_png(wave, sample_rate, columns=600):
    """A grey PNG of the log-mel power of a waveform, low pitches at the bottom."""
    mel = torchaudio.transforms.MelSpectrogram(sample_rate, 1024, hop_length=max(1, len(wave) // columns), n_mels=64)(wave)
    db = (mel.clamp_min(1e-8).log10() - mel.max().clamp_min(1e-8).log10()).clamp_min(-6) / 6 + 1
    pixels = (db.flip(0) * 255).byte().numpy()
    chunk = lambda name, raw: struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def chart(series, x_label, width=520, height=190):
    """An SVG line chart; series: (name, colour, [(x, y), ...], dashed)."""
    points = [p for _, _, line, _ in series for p in line] or [(0, 0)]
    x0, x1 = min(x for x, _ in points), max(max(x for x, _ in points), min(x for x, _ in points) + 1)
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    y0, y1 = min(0.0, lowest), highest * 1.05 if highest > 0 else 0.0 if lowest < 0 else 1.0
    at = lambda x, y: (40 + (x - x0) / (x1 - x0) * (width - 50), height - 24 - (y - y0) / (y1 - y0) * (height - 46))
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for y in (y0, (y0 + y1) / 2, y1):
        out.append(f'<path d="M40 {at(0, y)[1]:.1f}H{width - 10}" stroke="var(--line)"/><text x="36" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    out.append(f'<text x="40" y="{height - 6}">{x0:g}</text><text x="{width - 10}" y="{height - 6}" text-anchor="end">{escape(x_label)} {x1:g}</text>')
    for i, (name, colour, line, dashed) in enumerate(series):
        d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in (at(x, y) for x, y in line)) if line else ""
        dashes = 'stroke-dasharray="5 4"' if dashed else ""
        out.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2" {dashes}/>'
                   f'<text x="{44 + width // 3.3 * i:.0f}" y="13" style="fill:{colour}">{escape(name)}</text>')
    return "".join(out) + "</svg>"


def response_html(response, segments):
    """The response as it was written, a chip for every closed tag."""
    parts, out = response.split("</seg>"), []
    for i, part in enumerate(parts[:-1]):
        before, _, inside = part.rpartition("<seg>") if "<seg>" in part else (part, "", "")
        s = segments[i] if i < len(segments) else {"heard": False, "reason": "not heard", "start_s": None, "end_s": None}
        label = escape(f"<seg>{inside}</seg>")
        if s["heard"]:
            out.append(f'{escape(before)}<button class="chip" style="background:{COLOURS[i % 8]}" data-start="{s["start_s"]}" '
                       f'data-end="{s["end_s"]}" title="play this part">&#9654; {label}</button>')
        else:
            out.append(f'{escape(before)}<span class="chip rejected" title="{escape(str(s["reason"]))}">{label} &#10007; {escape(str(s["reason"]))}</span>')
    return "".join(out) + escape(parts[-1])


def clip_html(wave, sample_rate, question, choices, truth, row):
    """Spectrogram with the segments' spans, player, response with its chips, and the answer among the choices."""
    seconds = len(wave) / sample_rate
    spans = "".join(f'<div class="span" data-start="{s["start_s"]}" data-end="{s["end_s"]}" style="border-color:{COLOURS[i % 8]};'
                    f'background:{COLOURS[i % 8]}44;left:{100 * s["start_s"] / seconds:.2f}%;width:{100 * (s["end_s"] - s["start_s"]) / seconds:.2f}%"></div>'
                    for i, s in enumerate(row["segments"]) if s["heard"])
    ticks = "".join(f"<span>{seconds * i / 6:.1f} s</span>" for i in range(7))
    said = row["answer"]
    items = "".join(f"<li>{escape(c)}{' &larr; answer' if said and same_answer(c, said) else ''}"
                    f"{' <b class=right>&#10003; truth</b>' if truth and same_answer(c, truth) else ''}</li>" for c in choices)
    verdict = "" if not truth else ' <b class="right">right</b>' if said and same_answer(said, truth) else ' <b class="wrong">wrong</b>'
    return (f'<div class="clip"><div class="spectrogram"><img alt="spectrogram" src="{data_uri("image/png", spectrogram_png(wave, sample_rate))}">{spans}'
            f'<div class="cursor"></div></div><div class="axis">{ticks}</div><audio controls src="{data_uri("audio/wav", wav_bytes(wave.numpy(), sample_rate))}"></audio>'
            f'<p><b>{escape(question)}</b></p><div class="response">{response_html(row["response"], row["segments"])}</div>'
            f'<p>Answer: <b>{escape(said) if said else "none"}</b>{verdict} <span class="soft">ended: {escape(str(row["ended"]))}</span></p><ul>{items}</ul></div>')


def trace_page(path, model, wave, question, choices, truth, rollout, settings):
    """The page of one clip, with the attention on audio at each step, and that of the text decoding for comparison."""
    text_only = rollouts(model, [model.prompt(wave, question, choices)], [wave], 1, "text", 0.0, settings.max_new_tokens)[0]
    shares, text_shares = (attention_shares(model, r).tolist() for r in (rollout, text_only))
    series = [("first listen", COLOURS[1], [(i, a) for i, (a, _) in enumerate(shares)], False),
              ("re-listened segments", COLOURS[0], [(i, b) for i, (_, b) in enumerate(shares)], False),
              ("text decoding", "#868e96", [(i, a) for i, (a, _) in enumerate(text_shares)], True)]
    late = lambda rows: sum(a + b for a, b in rows[25:]) / max(1, len(rows[25:]))
    body = (f"<h1>Echo listens again</h1>{clip_html(wave, model.config.sample_rate, question, choices, truth, trace(rollout))}"
            f"<h2>Attention on audio tokens at each decoding step</h2>{chart(series, 'step')}"
            f"<p class=soft>Mean over layers and heads. From step 25 on: {late(shares):.1%} here, {late(text_shares):.1%} in the text decoding "
            f"of the same question. The paper reports 10-14% interleaved and below 5% in text, for a model of 7 billion parameters.</p>")
    page(path, "Echo: a trace", body)


def index_page(path, questions, rows, sample_rate, limit=60):
    """Traces of a benchmark run, with filters; the first `limit` rows, since every one carries its audio."""
    parts, kinds = [], sorted({q.category for q in questions})
    for q, row in [(q, r) for q, r in zip(questions, rows) if "error" not in r][:limit]:
        right = "" if not q.answer else "right" if same_answer(row["answer_prediction"], q.answer) else "wrong"
        row = row | {"answer": row["answer_prediction"]}
        parts.append(f'<details data-kind="{escape(q.category)}" data-right="{right}"><summary><b class="{right}">{right}</b> {escape(str(q.row.get("id", "")))}: '
                     f'{escape(q.question)}</summary>{clip_html(load_audio(q.path, sample_rate), sample_rate, q.question, q.choices, q.answer, row)}</details>')
    options = "".join(f'<option value="{escape(k)}">{escape(k)}</option>' for k in kinds)
    page(path, "Echo: traces", f'<h1>{len(parts)} of {len(rows)} traces</h1><p><select id="right"><option value="">right and wrong</option>'
         f'<option>right</option><option>wrong</option></select> <select id="kind"><option value="">all kinds</option>{options}</select></p>{"".join(parts)}')


def definitions():
    """Metric -> definition, from the one table in the README."""
    readme = Path(__file__).with_name("README.md")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", readme.read_text(encoding="utf-8") if readme.is_file() else "", re.M)
    return dict(rows)


def report_page(folder, against=None):
    """report.html in a run's folder: a chart for every metric of its log, and of the SFT run that it started from."""
    runs = [Path(folder)] + ([Path(against)] if against else [])
    logs = {}
    for run in runs:
        if not (run / "log.jsonl").is_file():
            raise EchoError(f"{run}: no log.jsonl; give the folder of a run")
        lines = (run / "log.jsonl").read_text().splitlines()
        logs[run.name] = [json.loads(line) for line in lines if line.endswith("}")]
    meaning, body = definitions(), ""
    stages = [("", logs)]
    started = runs[0] / "settings.json"
    if started.is_file() and (model := json.loads(started.read_text()).get("model")):
        for stage in (Path(model), Path(model).parent / "base"):
            if (stage / "log.jsonl").is_file():
                stages.append((f"Before it: {stage.name}", {stage.name: [json.loads(x) for x in (stage / "log.jsonl").read_text().splitlines()]}))
    for title, some in stages:
        names = dict.fromkeys(k for log in some.values() for entry in log for k in entry if k != "step" and not k.endswith("rejected"))
        reasons = sorted({r for log in some.values() for entry in log for r in entry.get("rejected", {})})
        cards = []
        for metric in [*names, *(f"rejected: {r}" for r in reasons)]:
            value = lambda e: e.get(metric) if not metric.startswith("rejected: ") else e["rejected"].get(metric[10:], 0.0) if "rejected" in e else None
            series = [(name, COLOURS[i], [(e["step"], value(e)) for e in log if isinstance(value(e), (int, float))], i > 0)
                      for i, (name, log) in enumerate(some.items())]
            plain = metric.split(":")[0].removeprefix("eval_")
            cards.append(f"<div><b>{escape(metric)}</b>{chart(series, 'step', 320, 150)}<p>{escape(meaning.get(metric, meaning.get(plain, '')))}</p></div>")
        body += f"<h2>{escape(title)}</h2>" * bool(title) + f'<div class="grid">{"".join(cards)}</div>'
    page(runs[0] / "report.html", f"Echo: {runs[0].name}", f"<h1>How {escape(' and '.join(logs))} learned</h1>{body}")


def run():
    settings = parse_settings(Settings, __doc__)
    for flag, value, known in (("reasoning", settings.reasoning, ("interleaved", "text")), ("insert", settings.insert, tuple(INSERTS))):
        if value not in known:
            raise EchoError(f"--{flag} {value}: must be one of {', '.join(known)}")
    if settings.report:
        report_page(settings.report, settings.against)
        return print(f"wrote {Path(settings.report) / 'report.html'}")
    model = load(settings.model, pick_device(settings.device)[0])
    if settings.benchmark:
        return run_benchmark(model, settings)
    return answer_clip(model, settings)


if __name__ == "__main__":
    main(run)
