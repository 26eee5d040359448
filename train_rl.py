"""Stage 2 of Echo: GRPO with the audio really inserted during the rollout.

    python train_rl.py                                      # D, interleaved -> runs/rl
    python train_rl.py --reasoning text --out runs/rl-text  # B', the text-only control, same steps

2 to 3.5 minutes on two CPU cores. Seed 0, 150 held-out questions: accuracy 0.45 before and 0.98
after on one processor, 0.91 and 0.99 on another.

A step: `questions` prompts, `group` responses to each at temperature 1, rewards, advantages within
each group, and `mini_batches` updates of the clipped objective with a k3 KL to the frozen SFT
policy (echo.grpo_update), in which a group without an advantage has its KL alone, or no part
(--flat). Left out: a value function (GRPO has none), epochs over the same rollouts, length filters.
"""
import copy
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from echo import (DTYPES, INSERTS, REASONING, REWARDS, EchoError, Training, already_trained, ask,
                  follow_decoder, group_advantages, grpo_update, is_right, linear_schedule, load,
                  load_audio, main, parse_settings, pick_device, prepare, processes,
                  read_questions, require)
from generate import evaluate, report_page, response_metrics


@dataclass
class Settings:
    model: str = "runs/sft"          # the SFT policy: where training starts, and the reference
    data: str = "data/rl.jsonl"      # rows in the published format, JSON or JSON lines
    test: str = "data/test.jsonl"    # rows to evaluate on; none: no evaluation
    audio_root: str = ""             # audio paths are relative to it, or to the data file's folder
    out: str = "runs/rl"             # folder for the log, the saves and the model
    reasoning: str = "interleaved"   # or text: nothing is inserted
    insert: str = "segment"          # what is heard; controls: random (another place) or silence
    reward: str = "paper"            # or confidence, or a function of your own in echo.REWARDS
    train: str = "decoder"           # or projector, or last-N layers
    steps: int = 120                 # the paper: one epoch of 21.9k rows
    questions: int = 8               # prompts a step; the paper: 64
    group: int = 8                   # responses to each, as in the paper
    lr: float = 2e-4                 # the paper: 1e-6, for 7 billion parameters
    projector_rate: float = 1.0      # the projector's learning rate, as a factor
    mini_batches: int = 2            # updates a step, as in the paper (64 / 32)
    warmup: int = 5                  # steps; afterwards linear to a tenth
    flat: str = "keep"               # groups without an advantage, in the update: keep or drop
    clip: float = 0.2                # of the ratio, as in the paper
    kl_weight: float = 0.04          # of k3 against the SFT policy, as in the paper
    temperature: float = 1.0         # of the rollouts, as in the paper
    max_new_tokens: int = 0          # 0: the model's own limit
    max_rows: int = 512              # responses decoded at once
    seed: int = 0                    # of the order of questions and of every draw
    device: str = "auto"             # cuda if there is one, else cpu
    dtype: str = "auto"              # fp32 or bf16; auto: bf16 for a pretrained decoder
    tokens_per_batch: int = 16384    # a micro-batch; gradients are accumulated over them
    checkpointing: bool = False      # gradient checkpointing: less memory, one more forward pass
    eval_every: int = 40             # steps between evaluations, beside the first and the last
    eval_questions: int = 150        # greedy, the first so many of --test
    save_every: int = 20             # steps between saves
    retrain: bool = False            # train again what is already trained
    # with a pretrained decoder the defaults are, as measured for the README; most groups are flat
    # there, since most answers are right already:
    PRETRAINED = dict(steps=12, questions=32, group=6, lr=1e-5, projector_rate=0.2, mini_batches=1,
                      warmup=4, flat="drop", tokens_per_batch=3000, save_every=3)


def main_loop(settings, policy):
    reference = copy.deepcopy(policy)
    prepare(policy, settings)
    prepare(reference, replace(settings, train="none", checkpointing=False)).eval()
    rows = read_questions(settings.data, settings.audio_root)
    test = []
    if settings.test != "none":
        test = read_questions(settings.test, settings.audio_root)[:settings.eval_questions]
    training = Training(settings.out, policy, asdict(settings),
                        {"projector": settings.projector_rate})

    def check():
        if test:
            show = ("eval_accuracy", "eval_segments", "eval_truncated")
            training.log(show, **evaluate(training, policy, test, **decoding(settings)))
        if training.rank == 0:
            report_page(settings.out)
    for step in training.steps(settings.steps, "grpo", settings.save_every):
        if step % settings.eval_every == 0:
            check()
        grpo_step(training, policy, reference, rows, settings)
    check()
    training.finish(policy)


def grpo_step(training, policy, reference, rows, settings):
    """Roll out, reward, update. The questions of a step are split over the processes."""
    began, step, group = time.time(), training.step, settings.group
    questions = [rows[i] for i in training.batch(len(rows), settings.questions, settings.seed)]
    waves = [load_audio(q.path, policy.config.sample_rate) for q in questions]
    mine = range(settings.questions)[training.rank::training.world]
    seeds = [np.random.SeedSequence([settings.seed, step, k, g]).generate_state(1)[0]
             for k in mine for g in range(group)]
    responses = ask(policy, questions, waves, group, temperature=settings.temperature, seeds=seeds,
                    **decoding(settings))
    decoded = time.time()

    answers = [q.answer for q in questions for _ in range(group)]
    parts = [REWARDS[settings.reward](r, answer) for r, answer in zip(responses, answers)]
    rewards = torch.tensor([float(sum(part.values())) for part in parts]).view(-1, group)
    advantages, flat = group_advantages(rewards).flatten(), rewards.std(1) < 1e-6
    updated = torch.arange(len(responses))
    if settings.flat == "drop":
        updated = updated[~flat.repeat_interleave(group)]

    lr = settings.lr * linear_schedule(step, settings.steps, settings.warmup, final=0.1)
    metrics = grpo_update(training, policy, reference, [responses[i] for i in updated],
                          advantages[updated], settings, lr)
    training.step += 1

    n = len(responses)
    means = {"reward": rewards.mean().item(),
             **{name: sum(part[name] for part in parts) / n for name in parts[0]},
             "right": sum(is_right(r.text, a) for r, a in zip(responses, answers)) / n,
             "flat_groups": flat.float().mean().item()}
    seconds, tokens = time.time() - began, sum(len(r.logprobs) for r in responses)
    speed = training.sum(n / seconds, tokens / seconds)
    means = training.mean(means) | response_metrics(responses, training.sum)
    training.log(("reward", "right", "segments", "kl", "seconds"), **means, **metrics,
                 responses_per_s=speed[0], tokens_per_s=speed[1], seconds=seconds,
                 decoding_share=(decoded - began) / seconds)


def decoding(settings):
    return {k: getattr(settings, k) for k in ("reasoning", "insert", "max_new_tokens", "max_rows")}


def run():
    settings = parse_settings(Settings, __doc__)
    require(settings, reward=REWARDS, reasoning=REASONING, insert=INSERTS, dtype=DTYPES,
            flat=("keep", "drop"))
    if settings.temperature <= 0:
        raise EchoError(f"--temperature {settings.temperature}: must be above 0, or all responses "
                        "of a group are the same")
    policy, (_, world) = load(settings.model, pick_device(settings.device)), processes()
    follow_decoder(settings, policy.config.decoder)
    if settings.questions % (settings.mini_batches * world) or settings.group < 2:
        raise EchoError(f"--questions {settings.questions}: must be a multiple of --mini-batches x "
                        f"processes, {settings.mini_batches * world}, and --group at least 2")
    if not already_trained(settings.out, asdict(settings)):
        main_loop(settings, policy)


if __name__ == "__main__":
    main(run)
