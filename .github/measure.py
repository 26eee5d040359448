"""Measure what the README quotes, after training: python .github/measure.py [runs/rl]"""
# SPDX-License-Identifier: MIT
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import echo  # noqa: E402
from echo import GRPO, Segment, cut, grpo_step, load, rollouts  # noqa: E402
from make_data import load_audio, read_questions, read_rows  # noqa: E402


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
            start, end = (int(echo.THUMBNAIL_RATE * e[k]) for k in ("start_s", "end_s"))
            tokens["first-listen"].append(first[start:end].flatten())
            segment = Segment("", e["start_s"], e["end_s"])
            tokens["full-rate"].append(model.hear([cut(wave, segment)])[0].flatten())
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
    eos, limit = model.eos_ids, model.config.max_new_tokens
    model.eos_ids, model.config.max_new_tokens = set(), 40
    ours = seconds(lambda: rollouts(model, questions, waves, None, 0.0))
    prompts = [model.prompt(features, q.question, q.choices)
               for features, q in zip(model.hear(waves, True), questions)]
    x, mask = model.embed(prompts)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.bf16):
        theirs = seconds(lambda: model.decoder.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, min_new_tokens=40,
            max_new_tokens=40, pad_token_id=0))
    model.eos_ids, model.config.max_new_tokens = eos, limit
    print(f"64 rows of 40 tokens in text: {theirs / ours:.2f} times the speed of generate")


def step(policy, reference, questions, waves):
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6)
    how = GRPO(group=8, micro_batch=32 if policy.config.decoder == "tiny" else 8)
    took = seconds(lambda: grpo_step(policy, reference, optimizer, questions, waves, range(64), how))
    print(f"a GRPO step of 8 x 8: {took:.2f} s")


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/rl"
    model, policy = load(folder), load(Path(folder).parent / "sft")
    model.bf16 = policy.bf16 = "--bf16" in sys.argv
    questions = read_questions("data/test.jsonl")[:8]
    waves = [load_audio(q.path) for q in questions]
    probe(model, read_rows("data/clips.jsonl")[:1500])
    decoding(model, questions, waves)
    step(policy, model.requires_grad_(False), questions, waves)
