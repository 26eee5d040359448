"""Measure what RESULTS.md quotes, after training:

    python .github/measure.py rows RUNS SEED [DATA]    # every row of the table: JSON lines
    python .github/measure.py clips RUN SEED DATA ...  # one model on the test rows of each folder
    python .github/measure.py listening RUNS SEED [DATA]    # decisions, looks, oracle, turns
    python .github/measure.py speed RUNS               # probe, decoding, a GRPO step
    python .github/measure.py curve                    # .github/curve.svg from the logs in results/

RUNS: the folder with base, sft and rl, and for all rows rl-text and rl-base.
"""
# SPDX-License-Identifier: MIT
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import echo  # noqa: E402
from echo import GRPO, cut, grpo_step, load, rollouts  # noqa: E402
from generate import COLOURS, LISTEN, answer, measure  # noqa: E402
from make_data import (load_audio, look_for, read_questions, read_rows, segment_of,  # noqa: E402
                       point_to)


def seconds(call, repeat=3):
    """The median of some timings, after a first call that is not counted."""
    took = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[repeat // 2]


def probe(model, clips):
    """What a small network reads of the number of pulses from a sound's tokens."""
    tokens, pulses = {"first-listen": [], "full-rate": []}, []
    for clip in clips:
        wave = load_audio(Path("data") / clip["audio_path"])
        first = model.hear([wave], True)[0]
        for e in clip["A4_events"]:
            start, end = (int(echo.THUMBNAIL_RATE * s) for s in segment_of(e))
            tokens["first-listen"].append(first[start:end].flatten())
            tokens["full-rate"].append(model.hear([cut(wave, *segment_of(e))])[0].flatten())
            pulses.append(e["pulses"])
    y, n = torch.tensor(pulses), len(pulses) * 4 // 5  # the last fifth is not trained on
    for name, x in tokens.items():
        x = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 128), torch.nn.GELU(),
                                  torch.nn.Linear(128, 7))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(300):
            i = torch.randint(n, (128,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        right = (net(x[n:]).argmax(1) == y[n:]).float().mean()
        print(f"number of pulses read from {name} tokens: {right:.1%} of {len(y) - n} (chance 20%)")


def one_by_one(model, question, wave, seed):
    """The published scheme: a row at a time, the whole of it prefilled again after each segment."""
    prompt = model.prompt(model.hear([wave], True)[0], question.question, question.choices)
    row, since = echo.Rollout(prompt, wave, echo.np.random.default_rng(seed)), 0
    while not row.ended:
        if not since:
            cache = echo.transformers.DynamicCache(config=model.decoder.config)
        x, _ = model.embed([row.sample], [since])
        since = len(row.sample.ids)
        hidden = model.hidden(x, torch.ones(1, since).long(), cache)[:, -1]
        (token,), (logp,) = echo.sample_tokens(model.logits(hidden), [row], 1.0)
        echo.add_token(model, row, token, logp, cut)
        if row.waiting:
            echo.listen_again(model, [row], cut)
            since = 0
    return row.sample.ids


@torch.no_grad()
def decoding(model, questions, waves):
    questions, waves = ([x for x in xs for _ in range(8)] for xs in (questions, waves))
    rows = rollouts(model, questions, waves, seeds=range(64))
    together = seconds(lambda: rollouts(model, questions, waves, seeds=range(64)))
    began, alone = time.perf_counter(), []
    for i in range(0, 64, 8):
        alone.append(one_by_one(model, questions[i], waves[i], i))
    ratio = 8 * (time.perf_counter() - began) / together
    as_one = sum(ids == row.sample.ids for ids, row in zip(alone, rows[::8]))
    print(f"64 interleaved rollouts: {64 / together:.1f} responses a second, {ratio:.1f} times one "
          f"by one with re-prefill; same ids in {as_one} of 8")
    eos, limit = model.tokenizer.eos_token_id, model.config.max_new_tokens
    model.tokenizer.eos_token_id, model.config.max_new_tokens = None, 40
    ours = seconds(lambda: rollouts(model, questions, waves, None, 0.0))
    prompts = [model.prompt(features, q.question, q.choices)
               for features, q in zip(model.hear(waves, True), questions)]
    x, mask = model.embed(prompts)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.bf16):
        theirs = seconds(lambda: model.decoder.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, min_new_tokens=40,
            max_new_tokens=40, pad_token_id=0))
    model.tokenizer.eos_token_id, model.config.max_new_tokens = eos, limit
    print(f"64 rows of 40 tokens in text: {theirs / ours:.2f} times the speed of generate")


def step(policy, reference, questions, waves):
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6)
    how = GRPO(group=8, micro_batch=32 if policy.config.decoder == "tiny" else 8)
    took = seconds(
        lambda: grpo_step(policy, reference, optimizer, questions, waves, range(64), how))
    print(f"a GRPO step of 8 x 8: {took:.2f} s")


def chain(model, q, waves):
    """The prompt of a question to find, and the true chain up to its last look, with the audio;
    and where it has to be decided whether to go on: [(index of the id, go on?), ...]."""
    wave, looks = waves[q.path], q.row["listen_to"]
    sample = model.prompt(model.hear([wave], True)[0], q.question, q.choices)
    decisions = []
    for k, said in enumerate([*look_for(looks[:-1]), point_to(looks[-1])]):
        before, tag, after = said.partition("</seg>")
        if k:
            decisions.append((len(sample.ids), k < len(looks) - 1))
        sample.add(model.tokenize((" " if k else "<think>") + before + tag))
        sample.add_audio(model.hear([cut(wave, *segment_of(looks[k]))])[0])
        if k < len(looks) - 1:
            sample.add(model.tokenize(after))
    return sample, decisions


@torch.no_grad()
def decisions(model, questions, waves):
    """On true chains: how often " I look ..." or " Right ..." is likelier where it is right."""
    right = {True: [], False: []}
    go, stop = model.tokenize(" I")[0], model.tokenize(" Right")[0]
    for q in questions:
        sample, where = chain(model, q, waves)
        logits = model.logits(model.hidden(*model.embed([sample]))[0])
        for at, go_on in where:
            right[go_on].append(bool(logits[at - 1, go] > logits[at - 1, stop]) == go_on)
    return {name: sum(x) / len(x) for name, x in (("go_on", right[True]), ("stop", right[False]))}


def by_looks(questions, responses):
    """Accuracy and segments heard, by the number of looks that a question to find needs."""
    out = {}
    for n in (2, 3, 4):
        some = [(q, r) for q, r in zip(questions, responses)
                if q.category == "find" and len(q.row["listen_to"]) == n]
        metrics = measure(*zip(*some)) if some else {}
        out |= {f"find_{n}": metrics.get("accuracy"), f"segments_{n}": metrics.get("segments")}
    return out


@torch.no_grad()
def oracle(model, questions, waves):
    """Accuracy of questions to find when the true chain is given up to the last look."""
    rows = []
    for q in questions:
        rows.append(echo.Rollout(chain(model, q, waves)[0], waves[q.path], None))
    for some in echo.batches(rows, 50):
        echo.decode(model, some, None, 0.0)
    return sum(echo.is_right("<think>" + r.text, q) for q, r in zip(questions, rows)) / len(rows)


def listening(runs, seed, data="data"):
    questions = read_questions(f"{data}/test.jsonl")
    waves = {q.path: load_audio(q.path) for q in questions}
    find = [q for q in questions if q.category == "find"]
    for stage in ("base", "sft", "rl"):
        model = load(f"{runs}/{stage}")
        found = {"seed": int(seed), "stage": stage, "decisions": decisions(model, find, waves)}
        if stage != "base":
            found |= {"looks": by_looks(find, answer(model, find))}
        print(json.dumps(found), flush=True)
    print(json.dumps({"seed": int(seed), "oracle_find": oracle(model, find, waves)}), flush=True)
    for turns in (1, 2, 3, 4):
        model.config.max_turns = turns
        entry(model, questions, "segment", seed=int(seed), max_turns=turns)


ROWS = {"A": ("base", "nothing"), "base": ("base", "segment"), "B": ("sft", "nothing"),
        "C": ("sft", "segment"), "D": ("rl", "segment"), "B'": ("rl-text", "nothing"),
        "D elsewhere": ("rl", "elsewhere"), "D silence": ("rl", "silence"),
        "E": ("rl-base", "segment")}


def by_gap(questions, responses):
    """Accuracy by the gap between the two sounds of a question about what comes after."""
    gaps = {"touching": [], "near": [], "far": []}  # up to a second; over a second
    for q, r in zip(questions, responses):
        if q.category != "count" and len(q.listen_to) > 1:
            before, after = q.listen_to[-2:]
            gap_s = after["start_s"] - before["end_s"]
            name = "far" if gap_s > 1 else "near" if gap_s > 0.02 else "touching"
            gaps[name].append(echo.is_right(r.text, q))
    return {name: sum(x) / len(x) for name, x in gaps.items() if x} | {
        f"n_{name}": len(x) for name, x in gaps.items()}


def entry(model, questions, listen, **head):
    responses = answer(model, questions, LISTEN[listen])
    metrics = measure(questions, responses, {q.category for q in questions})
    metrics = {k: float(f"{v:.4g}") for k, v in (metrics | by_gap(questions, responses)).items()}
    print(json.dumps({**head, "questions": len(questions), **metrics}), flush=True)


def rows(runs, seed, data="data"):
    questions = read_questions(f"{data}/test.jsonl")
    for row, (stage, listen) in ROWS.items():
        if (Path(runs) / stage / "model").is_dir():
            entry(load(f"{runs}/{stage}"), questions, listen, seed=int(seed), row=row)


def clips(run, seed, *folders):
    for folder in folders:
        entry(load(run), read_questions(f"{folder}/test.jsonl"), "segment", seed=int(seed),
              run=Path(run).name, clips=Path(folder).name)


def speed(runs):
    model, policy = load(f"{runs}/rl"), load(f"{runs}/sft")
    model.bf16 = policy.bf16 = "--bf16" in sys.argv
    questions = read_questions("data/test.jsonl")[:8]
    waves = [load_audio(q.path) for q in questions]
    probe(model, read_rows("data/clips.jsonl")[:1500])
    decoding(model, questions, waves)
    step(policy, model.requires_grad_(False), questions, waves)


def curve():
    """Held-out accuracy, hits and share of a sound that is heard over the RL steps: the mean of all
    seeds, and each seed."""
    here, lines = Path(__file__).parent, ""
    log = [e for e in read_rows(here / "results/rl.jsonl") if "eval_accuracy" in e]
    for e in log:
        e["heard"] = e["eval_heard_s"] / e["eval_sound_s"]
    steps = sorted({e["step"] for e in log})
    names = {"eval_accuracy": "right answers", "heard": "seconds heard / true", "eval_hits": "hits"}
    left, right, top, bottom = 40, 400, 12, 200

    def across(step):
        return left + (right - left) * step / steps[-1]

    def up(share):
        return bottom - (bottom - top) * share
    for k, ((name, said), colour) in enumerate(zip(names.items(), COLOURS)):
        seeds = [[e[name] for e in log if e["seed"] == s] for s in sorted({e["seed"] for e in log})]
        mean = [sum(values) / len(values) for values in zip(*seeds)]
        for values in (*seeds, mean):
            at = " ".join(f"{across(x):.0f},{up(y):.1f}" for x, y in zip(steps, values))
            width, dim = (2.5, "") if values is mean else (1, ' opacity="0.3"')
            lines += f'<polyline points="{at}" stroke="{colour}" stroke-width="{width}"{dim}/>'
        lines += (f'<text x="{right + 8}" y="{top + 80 + 18 * k}" fill="{colour}">{said} '
                  f'{100 * mean[0]:.0f} &#8594; {100 * mean[-1]:.0f}</text>')
    ticks = "".join(f'<text x="4" y="{up(y) + 4:.0f}">{100 * y:.0f}%</text>'
                    for y in (0, 0.25, 0.5, 0.75, 1.0))
    ticks += "".join(f'<text x="{across(x) - 6:.0f}" y="{bottom + 18}">{x}</text>' for x in steps)
    (here / "curve.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 225" width="600" height="225" '
        f'font-family="sans-serif" font-size="12" fill="none"><g fill="#777">{ticks}'
        f'<text x="{right + 20}" y="{bottom + 18}">RL steps</text></g>'
        f'<g>{lines}</g></svg>')


if __name__ == "__main__":
    {"speed": speed, "listening": listening, "curve": curve, "rows": rows,
     "clips": clips}[sys.argv[1]](*sys.argv[2:])
