"""Stage 2 of Echo: GRPO with the audio really inserted during the rollout.

    python train_rl.py                                     # interleaved -> runs/rl
    python train_rl.py --listen nothing --out runs/rl-text # the text-only control, same steps

A killed run goes on with the same command. An evaluation's questions are drawn from the test file,
the same ones each time.
"""
# SPDX-License-Identifier: MIT
import contextlib
import copy
import inspect
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from echo import (GRPO, EchoError, grpo_step, load, main, means, model_folder, paper_reward,
                  parse_settings, pick_device, processes, sum_over_processes)
from generate import LISTEN, answer, measure, report_page, set_limits
from make_data import check_rows, load_audio, lock, name_of, read_questions
from train_sft import Training, is_finished, linear_schedule, stamp

REWARD = paper_reward  # or a function of your own: (rollout, question) -> {name: number}


@dataclass
class Settings(GRPO):
    model: str = "runs/sft"     # the SFT policy: where training starts, and the reference
    data: str = "data/rl.jsonl"    # rows in the published format, JSON or JSON lines
    test: str = "data/test.jsonl"  # evaluated on 150 of its rows; none: not at all
    audio_root: str = ""        # audio paths are relative to it, or to the data file's folder
    out: str = "runs/rl"        # folder for the log, the save and the model
    listen: Literal[tuple(LISTEN)] = "segment"  # or nothing: text reasoning; silence, elsewhere
    steps: int = 60             # the paper: one epoch of 21.9k rows
    questions: int = 16         # prompts a step; the paper: 64
    lr: float = 3e-4            # the paper: 1e-6, for 7 billion parameters
    projector_rate: float = 1.0  # the projector's learning rate, as a factor
    max_turns: int = 0          # segments heard in a response; 0: as the model has it
    max_new_tokens: int = 0     # sampled tokens of a response; 0: as the model has it
    bf16: bool = False          # bf16 arithmetic in the decoder
    seed: int = 0               # of the order of questions and of every draw
    eval_every: int = 10        # steps between evaluations, beside the first and the last
    save_every: int = 10        # steps between saves

# With a pretrained decoder the defaults are, as measured for the README:
PRETRAINED = dict(steps=16, questions=32, group=6, lr=1e-5, projector_rate=0.2, save_every=3,
                  bf16=torch.cuda.is_available())


def train(policy, rows, settings, wanted):
    check_rows(rows)
    reference = copy.deepcopy(policy).requires_grad_(False)
    test = []
    if settings.test != "none":
        test = read_questions(settings.test, settings.audio_root)
        test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:150]]
    training = Training(settings.out, policy, settings, wanted,
                        {"projector": settings.projector_rate})
    for step in training.steps(settings.steps, "grpo"):
        if step % settings.eval_every == 0:
            evaluate(policy, training, test, settings)
        began = time.time()
        questions = [rows[i] for i in training.batch(len(rows), settings.questions)]
        mine = range(settings.questions)[training.rank::training.world]
        seeds = [(settings.seed, step, k, g) for k in mine for g in range(settings.group)]
        training.set_lr(settings.lr * linear_schedule(step, settings.steps, 0.04, final=0.1))
        responses, parts, metrics = grpo_step(
            policy, reference, training.optimizer, questions,
            [load_audio(q.path) for q in questions], seeds, settings, LISTEN[settings.listen],
            REWARD)
        training.step += 1

        for q, r in zip(questions, responses[::settings.group]):
            if not r.logprobs:
                tqdm.write(f"{settings.data}: {name_of(q)}: {r.ended}, not used")
        if not sum_over_processes(sum(len(r.logprobs) for r in responses)):
            raise EchoError(f"{settings.data}: no prompt of step {step + 1} fits the context")
        by_name = means({f"reward_{name}": (sum(part[name] for part in parts), len(parts))
                         for name in parts[0]})
        asked = [q for q in questions for _ in range(settings.group)]
        metrics |= {"reward": sum(by_name.values()), **by_name,
                    **measure(asked, responses), "seconds": time.time() - began}
        training.log(metrics, show=("reward", "accuracy", "hits", "segments", "kl", "seconds"))
    evaluate(policy, training, test, settings)
    training.finish(policy)


def evaluate(policy, training, test, settings):
    """Answer held-out questions, greedy, and log how well."""
    if test:
        mine = test[training.rank::training.world]
        responses = answer(policy, mine, LISTEN[settings.listen])
        for q, r in zip(mine, responses):
            if not r.logprobs:
                tqdm.write(f"{settings.test}: {name_of(q)}: {r.ended}: wrong")
        metrics = measure(mine, responses, {q.category for q in test})
        training.log({f"eval_{name}": value for name, value in metrics.items()},
                     show=("eval_accuracy", "eval_hits", "eval_segments", "eval_truncated"))


def run():
    settings = parse_settings(Settings, __doc__)
    policy = load(settings.model, pick_device(train=True))
    if policy.config.decoder != "tiny":
        settings = parse_settings(Settings, __doc__, PRETRAINED)
    policy.bf16 = settings.bf16
    set_limits(policy, settings)
    if settings.temperature <= 0 or settings.group < 2:
        raise EchoError("--temperature must be above 0 and --group at least 2, or the responses of "
                        "a group are all the same")
    multiple = settings.mini_batches * processes()[1]
    if settings.questions % multiple:
        raise EchoError(f"--questions {settings.questions}: must be a multiple of --mini-batches x "
                        f"processes, {multiple}")
    with lock(settings.out):
        rows = read_questions(settings.data, settings.audio_root)
        inputs = {"model": [model_folder(settings.model)],
                  "data": [settings.data, *sorted({q.path for q in rows})]}
        if settings.test != "none":
            inputs["test"] = [settings.test]
        wanted = stamp(settings, inputs)
        if not inspect.isfunction(REWARD) or REWARD.__closure__:
            raise EchoError("REWARD: needed is a plain function, by whose text a run that was "
                            "killed knows its reward again")
        with contextlib.suppress(OSError):  # it may have no source
            wanted["reward"] = inspect.getsource(REWARD)
        if not is_finished(settings.out, wanted):
            train(policy, rows, settings, wanted)
        if processes()[0] == 0:
            report_page(settings.out)


if __name__ == "__main__":
    main(run)
