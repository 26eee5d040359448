"""Stage 2 of Echo: GRPO with the audio really inserted during the rollout.

    python train_rl.py                                      # D, interleaved -> runs/rl: 2 minutes on two CPU cores,
                                                            # held-out accuracy 0.55 before, 0.97 after (seed 0)
    python train_rl.py --reasoning text --out runs/rl-text  # B', the text-only control, same steps

A step: `questions` prompts, `group` responses to each at temperature 1, rewards, advantages within each group, and
`mini_batches` updates of the clipped objective with a k3 KL to the frozen SFT policy. Left out of the textbook:
a value function (GRPO has none), epochs over the same rollouts, and length or difficulty filters on the questions.
"""
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from echo import (REWARDS, EchoError, Training, evaluate, finished, fixed, grpo_loss, group_advantages, is_right,
                  linear_schedule, listening, load, load_audio, main, parse_settings, pick_device, read_questions,
                  response_weights, rollouts, save)
from generate import report_page


@dataclass
class Settings:
    model: str = "runs/sft"          # the SFT policy: where training starts, and the reference policy
    data: str = "data/rl.jsonl"      # rows in the published format, JSON or JSON lines
    test: str = "data/test.jsonl"    # rows to evaluate on; "none": no evaluation
    audio_root: str | None = None    # audio paths are relative to this folder; none: to the data file's
    out: str = "runs/rl"             # folder for the log, the saves and the model
    reasoning: str = "interleaved"   # or text: nothing is inserted
    reward: str = "paper"            # or confidence, or a function of your own in echo.REWARDS
    steps: int = 120                 # the paper: 1 epoch over 21.9k rows
    questions: int = 8               # prompts a step (the paper: 64)
    group: int = 8                   # responses to each
    mini_batches: int = 2            # updates a step, as in the paper (64 / 32)
    lr: float = 2e-4                 # the paper: 1e-6, for a model 10,000 times as large
    warmup: int = 5                  # steps; afterwards linear to a tenth
    clip: float = 0.2                # of the ratio
    kl_weight: float = 0.04          # of k3 against the SFT policy
    temperature: float = 1.0         # of the rollouts
    max_new_tokens: int = 100        # the toy's responses have 30 to 55
    seed: int = 0                    # of the order of questions and of every draw
    device: str = "auto"             # cuda if there is one, else cpu
    tokens_per_batch: int = 16384    # micro-batches hold at most so many tokens, gradients are accumulated over them
    checkpointing: bool = False      # gradient checkpointing: less memory, one more forward pass
    eval_every: int = 40             # steps between evaluations, beside the first and the last
    eval_questions: int = 150        # greedy, the first so many of --test
    save_every: int = 20             # steps between saves
    retrain: bool = False            # train again what is already trained


def main_loop(settings, device, rank, world):
    policy = load(settings.model, device)
    policy.encoder.requires_grad_(False)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if device.type == "cuda":
        reference.decoder.bfloat16()
    if settings.checkpointing:
        policy.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    questions = read_questions(settings.data, settings.audio_root)
    test = [] if settings.test == "none" else read_questions(settings.test, settings.audio_root)[:settings.eval_questions]
    training = Training(settings.out, policy, fixed(settings), device, rank, world)
    bar = tqdm(total=settings.steps, initial=training.step, desc="grpo", disable=rank > 0)
    while training.step < settings.steps:
        if training.step % settings.eval_every == 0:
            check(training, policy, test, settings)
        grpo_step(training, policy, reference, questions, settings)
        bar.update()
        if training.step % settings.save_every == 0:
            training.save()
            if rank == 0:
                report_page(settings.out)
    check(training, policy, test, settings)
    training.save()
    if rank == 0:
        report_page(settings.out)
        save(policy, Path(settings.out) / "model")


def check(training, policy, test, settings):
    if test:
        training.log(**evaluate(training, policy, test, settings.reasoning, settings.max_new_tokens))


def grpo_step(training, policy, reference, questions, settings):
    """One step: roll out, reward, update. The questions of each mini-batch are split over the processes."""
    began, step = time.time(), training.step
    batch = [questions[i] for i in training.batch(len(questions), settings.questions, settings.seed)]
    slots = range(settings.questions)[training.rank::training.world]  # their places in the whole step's batch
    waves = [load_audio(q.path, policy.config.sample_rate) for q in batch]
    prompts = [policy.prompt(w, q.question, q.choices) for w, q in zip(waves, batch)]
    seeds = [int(np.random.SeedSequence([settings.seed, step, k, g]).generate_state(1)[0]) for k in slots for g in range(settings.group)]
    policy.eval()
    responses = rollouts(policy, prompts, waves, settings.group, settings.reasoning, settings.temperature,
                         settings.max_new_tokens, seeds=seeds)
    decoded = time.time()
    answers = [q.answer for q in batch for _ in range(settings.group)]
    parts = [REWARDS[settings.reward](r, a) for r, a in zip(responses, answers)]
    rewards = torch.tensor([sum(p.values()) for p in parts]).view(-1, settings.group)
    metrics = update_policy(training, policy, reference, responses, group_advantages(rewards).flatten(), settings)

    n = len(responses)
    means = {"reward": rewards.mean().item(), **{k: sum(p[k] for p in parts) / n for k in parts[0]},
             "right": sum(is_right(r.text, a) for r, a in zip(responses, answers)) / n,
             "flat_groups": (rewards.std(1) < 1e-6).float().mean().item(), **listening(responses)}
    means = training.mean(means, n)
    seconds, tokens = time.time() - began, sum(len(r.logprobs) for r in responses)
    speed = training.sum(n / seconds, tokens / seconds)
    training.log(**means, **metrics, responses_per_s=speed[0], tokens_per_s=speed[1],
                 decoding_share=(decoded - began) / seconds)


def update_policy(training, policy, reference, responses, advantages, settings):
    """`mini_batches` updates on the responses of one step; returns the means of what was seen on the way."""
    policy.train()  # nothing drops out; gradient checkpointing works in this mode alone
    seen = torch.zeros(5, dtype=torch.float64)
    factor = linear_schedule(training.step, settings.steps, settings.warmup, final=0.1)
    for part in torch.arange(len(responses)).chunk(settings.mini_batches):
        samples = [responses[i].sample for i in part]
        lengths = torch.tensor([sum(s.trained) for s in samples])
        weights = response_weights(samples, training.sum(len(samples))[0])
        advantage = advantages[part].repeat_interleave(lengths)
        old_logp = torch.tensor([x for i in part for x in responses[i].logprobs])
        ref_logp = reference.log_probs(samples, settings.temperature, settings.tokens_per_batch)
        weights, advantage, old_logp = (x.to(ref_logp) for x in (weights, advantage, old_logp))

        def loss(here, logp, entropy):
            each, k3, clipped = grpo_loss(logp, old_logp[here], ref_logp[here], advantage[here], settings.clip, settings.kl_weight)
            value = (weights[here] * each).sum()
            gap = (logp.detach() - old_logp[here]).abs()
            seen[:] += torch.stack([(weights[here] * x).sum() for x in (each.detach(), k3, clipped, entropy, gap)]).double().cpu()
            return value
        training.backward(samples, loss, settings.tokens_per_batch, settings.temperature)
        training.update(settings.lr * factor)
    training.step += 1
    names = ("loss", "kl", "clip_share", "entropy", "logp_gap")
    return dict(zip(names, [x / settings.mini_batches for x in training.sum(*seen)]))


def run():
    settings = parse_settings(Settings, __doc__)
    for name, known in (("reward", REWARDS), ("reasoning", ("interleaved", "text"))):
        if getattr(settings, name) not in known:
            raise EchoError(f"--{name} {getattr(settings, name)}: must be one of {', '.join(known)}")
    device, rank, world = pick_device(settings.device)
    if settings.questions % (settings.mini_batches * world) or settings.group < 2:
        raise EchoError(f"--questions {settings.questions}: must be a multiple of --mini-batches x processes, "
                        f"{settings.mini_batches * world}, and --group at least 2")
    if not finished(settings.out, fixed(settings), settings.retrain, rank, world):
        main_loop(settings, device, rank, world)


if __name__ == "__main__":
    main(run)
