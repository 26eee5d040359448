"""Use a trained Echo: one clip, a benchmark file, or a picture of either.

    python generate.py                                                  # a held-out toy clip
    python generate.py clip.wav "How many pulses has the hum?" --choices two three four five
    python generate.py --benchmark data/test.jsonl --output runs/test.jsonl
    python generate.py --html trace.html                                # with any of these: a page that shows it
    python generate.py --report runs/rl --against runs/rl-text          # how training went, as a page

Decoding is the very function that train_rl.py rolls out with. Left out: streaming audio in, batching over clips of
one conversation, sampling several answers and voting.
"""
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from echo import (INSERTS, EchoError, Rollout, Segment, extract_answer, interval, listening, load, load_audio, main,
                  parse_settings, pick_device, read_questions, read_rows, rollouts, same_answer, write_atomically)


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
        rows.append({**q.row, "answer_prediction": said or "", "model_output": said or "", "answered": said is not None, **t,
                     "seconds": round(seconds, 4)})
    return rows


def summarise(questions, rows):
    """Accuracy by category with a 95% interval (where the truth is known), listening, and seconds a question."""
    summary = {"questions": len(rows), "no_answer": sum(not r["answered"] for r in rows)}
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
              f"no answer {s['no_answer']} of {s['questions']}   truncated {s['truncated']:.1%}   "
              f"rejected tags {', '.join(f'{k} {v:.1%}' for k, v in s['rejected'].items()) or 'none'}",
              f"{s['seconds']:.3f} s a question"]
    return "\n".join(lines)


def run():
    settings = parse_settings(Settings, __doc__)
    for flag, value, known in (("reasoning", settings.reasoning, ("interleaved", "text")), ("insert", settings.insert, tuple(INSERTS))):
        if value not in known:
            raise EchoError(f"--{flag} {value}: must be one of {', '.join(known)}")
    torch.manual_seed(settings.seed)
    model = load(settings.model, pick_device(settings.device)[0])
    if settings.benchmark:
        return run_benchmark(model, settings)
    return answer_clip(model, settings)


if __name__ == "__main__":
    main(run)
