"""Echo in one file: an audio language model that listens again while it reasons (arXiv 2602.11909).

The whole method, A being a clip and q a question about it:

    x = prompt(A, q)                       # the clip, heard once (here coarsely), and the question
    until the response o ends with eos (or is too long):
        o += sample(policy(x + o))         # one token of text
        if o closes <seg>s, e</seg>:
            o += enc(A[s:e])               # hear that part of the ORIGINAL waveform at full rate
    R     = format + consistency + accuracy + segment          # the four rewards of a response
    adv   = (R - mean R) / std R                               # within the group of one question
    ratio = p(o) / p_old(o)                # of each sampled token; old: before the step's updates
    loss  = -min(ratio adv, clamp(ratio) adv) + kl_weight k3   # GRPO, arXiv 2402.03300; k3: the
                                           # KL to the SFT policy, estimated for each token

A response is plain text, tags and all, as in this chain, from which stage 1 learns:

    <think>the hum <seg>1.0, 2.5</seg> the hum has two pulses.</think><answer>two</answer>

Stage 1, SFT, teaches to write tags: the clip is in the prompt, no audio follows a tag. It starts
from a base model that knows what short clips are like at the full rate (made in train_sft.py).
Stage 2, RL, teaches to gain from what the tags bring. Each loops over its lines here:

    prompt = policy.prompt(policy.hear([wave], first_listen=True)[0], question, choices)
    sft_loss(policy, [policy.add_response(prompt, chain), ...]).backward()
    optimizer_step(optimizer)                      # optimizer: of what requires a gradient

    reference = copy.deepcopy(policy).requires_grad_(False)        # the SFT policy, once
    grpo_step(policy, reference, optimizer, questions, waves, seeds, GRPO())

Settings and schedules are in train_sft.py and train_rl.py. The method ends after section 6, GRPO.
"""
# SPDX-License-Identifier: MIT
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE = 16_000    # Hz, of every waveform
TOKENS_PER_SECOND = 25  # of audio at the full rate
THUMBNAIL_RATE = 2      # of audio in a first listen that is a thumbnail


@dataclass
class Config:
    """What a model is; saved with its weights."""
    encoder: str = "small"        # or a Whisper checkpoint: a name or a local folder
    decoder: str = "tiny"         # made in train_sft.py; or a Qwen2 checkpoint, as above
    thumbnail: bool = True        # first listen: 2 audio tokens a second, so that listening again
                                  # finds something new; False: 25 a second, as in the paper
    min_segment_s: float = 0.2    # as in the paper
    max_segment_s: float = 30.0
    end_slack_s: float = 0.5      # an end this far past the clip is taken as its end
    max_turns: int = 8            # segments heard in one response, as in the paper
    max_new_tokens: int = 100     # sampled tokens of a response


# =================================================================================== 1 segment tags
@dataclass
class Segment:
    """What a pair of tags asked for, and what came of it."""
    tag: str
    start_s: float | None = None
    end_s: float | None = None
    heard: bool = False
    refused: str | None = None  # why it is not heard


NUMBER = r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*"
TAG = re.compile(f"<seg>{NUMBER},{NUMBER}</seg>")  # <seg>2, 2.5</seg>


def split_segments(text):
    """Take a text apart at its closed tags: [(text before, "<seg>...</seg>"), ...], the rest. A
    </seg> without a <seg> of its own is a tag, too."""
    *parts, rest = text.split("</seg>")
    pairs = []
    for part in parts:
        at = part.rfind("<seg>")
        at = at if at >= 0 else len(part)
        pairs.append((part[:at], part[at:] + "</seg>"))
    return pairs, rest


def parse_segment(tag, duration_s, turns=0, config=Config()):
    """A closed tag -> Segment; never raises: what is wrong with it stands in `refused`. turns: how
    many were heard before."""
    match = TAG.fullmatch(tag)
    if not match:
        return Segment(tag, refused="malformed")
    start_s, end_s = map(float, match.groups())
    if duration_s < end_s <= duration_s + config.end_slack_s:
        end_s = duration_s
    length_s = end_s - start_s
    wrong = {"outside the clip": max(start_s, end_s) > duration_s,
             "reversed": length_s < 0,
             "too short": length_s < config.min_segment_s - 1e-6,  # in floats 0.3 - 0.1 < 0.2
             "too long": length_s > config.max_segment_s + 1e-6,
             "too many turns": turns >= config.max_turns}
    refused = next((name for name, holds in wrong.items() if holds), None)
    return Segment(tag, start_s, end_s, refused=refused)


# ================================================================= 2 text and audio in one sequence
AUDIO = -1  # stands in the ids where an audio token does; no id of any vocabulary


@dataclass
class Sample:
    """Text and audio as one sequence: the input of SFT, of a rollout and of its update."""
    ids: list = field(default_factory=list)       # token ids, AUDIO for each audio token
    trained: list = field(default_factory=list)   # has a loss: a response to learn, a sampled id
    audio: list = field(default_factory=list)     # features (encoder dim,) at AUDIO, else None

    def add(self, ids, trained=False, audio=None):
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.audio += audio or [None] * len(ids)
        return self

    def add_audio(self, features):
        """Append an audio token for each row of `features` (n, encoder dim)."""
        return self.add([AUDIO] * len(features), audio=list(features))

    @property
    def sampled(self):
        """The ids of a rollout without its prompt and without audio, eos included."""
        return [i for i, trained in zip(self.ids, self.trained) if trained]


def pad_left(rows, device):
    """Lists of numbers -> (B, T), the shorter ones with zeros on the left."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side="left").to(device)


# ====================================================================================== 3 the model
class Echo(nn.Module):
    """Audio encoder, projector and a Qwen2 decoder; enc(.) of the paper is encoder, then projector.
    The encoder is frozen in both stages: Whisper's weights, or those of a sound-event detector that
    train_sft.py trains before, on full-rate and thumbnail input. Trained are the projector and the
    decoder, but not a pretrained decoder's embeddings and head, since no token is new."""

    def __init__(self, config, encoder, decoder, tokenizer):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.tokenizer, self.bf16 = tokenizer, False  # the scripts set bf16
        self.tokenize = functools.lru_cache(2 ** 16)(  # texts come again: prompts 5x as fast
            lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        self.projector = nn.Linear(encoder.dim, decoder.config.hidden_size)
        self.encoder.requires_grad_(False)
        for table in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
            table.requires_grad_(config.decoder == "tiny")
        self.eval()  # for good: nothing drops out, in training neither

    @property
    def device(self):
        return self.projector.weight.device

    @torch.no_grad()
    def hear(self, waves, first_listen=False):
        """Waveforms (N_i,) on the CPU -> features (n_i, encoder dim), which embed() projects. Those
        of one length go together, unpadded, each distinct one once: rollouts 1.2x as fast."""
        keys = [wave.numpy().tobytes() for wave in waves]
        features = {}
        for size in {len(wave) for wave in waves}:
            some = {key: wave for key, wave in zip(keys, waves) if len(wave) == size}
            batch = torch.stack(list(some.values())).to(self.device)
            features |= zip(some, self.encoder(batch, first_listen and self.config.thumbnail))
        return [features[key] for key in keys]

    def prompt(self, features, question, choices=()):
        """What a response continues: the first listen, its times as text, and the question.
            [audio]0.0[audio]0.5 ... [audio]5.5 6.0 How many pulses has the hum? Choose from ...
        features: (n, encoder dim) of the first listen; [] for a question without a clip. A token is
        followed by its start time, at the full rate every 25th; last stands the end of all."""
        sample = Sample()
        rate = THUMBNAIL_RATE if self.config.thumbnail else TOKENS_PER_SECOND
        every = 1 if self.config.thumbnail else rate
        for i in range(0, len(features), every):
            sample.add_audio(features[i:i + 1]).add(self.tokenize(f"{i / rate:.1f}"))
            sample.add_audio(features[i + 1:i + every])
        if len(features):
            sample.add(self.tokenize(f" {len(features) / rate:.1f}"))
        if choices:
            listed = json.dumps(choices, ensure_ascii=False)  # quoted: a choice may hold a comma
            question = f"{question} Choose from {listed}."
        return sample.add(self.tokenize(f" {question}\n"))

    def add_response(self, sample, text):
        """Append to the prompt, in place, a whole response to learn, with eos."""
        return sample.add(self.tokenize(text) + [self.tokenizer.eos_token_id], trained=True)

    def embed(self, samples, since=None):
        """Embeddings x (B, T, D) of each sample's ids and audio, from index `since` on if a cache
        holds what is before, padded on the left; and the mask of these T columns."""
        since = since or [0] * len(samples)
        new = [s.ids[start:] for s, start in zip(samples, since)]
        audio = [a for s, start in zip(samples, since) for a in s.audio[start:] if a is not None]
        ids = pad_left(new, self.device)
        x = self.decoder.get_input_embeddings()(ids.clamp_min(0))  # AUDIO: replaced below
        if audio:
            x = x.masked_scatter((ids == AUDIO)[..., None], self.projector(torch.stack(audio)))
        return x, pad_left([[1] * len(row) for row in new], self.device)

    def hidden(self, x, mask, cache=None):
        """(B, T, D) embeddings -> last hidden states; `mask` (B, cached + T) marks the real tokens.
        They have positions 0, 1, 2, ..., text and audio alike, also within a segment; padding's do
        not matter: mask 0 1 1 0 1, positions 0 0 1 1 2. Attention is causal by column."""
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, -x.shape[1]:]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.decoder.model(
                inputs_embeds=x, attention_mask=mask, position_ids=position, cache=cache,
                use_cache=cache is not None).last_hidden_state  # `cache`: as of transformers 5.24

    def logits(self, hidden):
        """(..., D) -> (..., V), in fp32: bf16 logits of 16 to 32 are 0.125 apart, too far for a
        ratio of probabilities."""
        return self.decoder.lm_head(hidden.float())

    def forward(self, samples, temperature=1.0):
        """Log-probs of every trained token, flat in the order of the samples: (n,)."""
        hidden = self.hidden(*self.embed(samples))
        ids = pad_left([s.ids for s in samples], self.device)
        trained = pad_left([s.trained for s in samples], self.device)[:, 1:] > 0
        logits = self.logits(hidden[:, :-1][trained]) / temperature    # position t - 1 predicts t
        return -F.cross_entropy(logits, ids[:, 1:][trained], reduction="none")


def sft_loss(model, samples, n_tokens=None):
    """Stage 1: the mean of -log p over the trained tokens. n_tokens: how many the whole batch has,
    on all processes, if these samples are a part of it."""
    logp = model(samples)
    return -logp.sum() / (n_tokens or len(logp))


# =========================================================================== 4 interleaved decoding
@dataclass
class Rollout:
    """A response while it is written, and its trace afterwards."""
    sample: Sample              # the prompt, then sampled ids and inserted audio
    wave: torch.Tensor          # the original clip, (N,)
    draws: np.random.Generator  # this row's own: it does not depend on its neighbours
    text: str = ""              # the sampled text, without eos
    logprobs: list = field(default_factory=list)  # of the sampled ids, as sampled: one for each
    segments: list = field(default_factory=list)  # a Segment for each </seg>
    waiting: bool = False       # for the audio of its last segment
    ended: str | None = None    # "eos", "length", or "prompt too long", then without a response
    cached: int = 0             # ids before this one are in the KV cache

    @property
    def heard_segments(self):
        return [s for s in self.segments if s.heard]


def cut(wave, start_s, end_s):
    """A[s:e] of the paper, of a waveform (N,)."""
    return wave[round(start_s * SAMPLE_RATE):round(end_s * SAMPLE_RATE)]


@torch.no_grad()
def rollouts(model, questions, waves, listen=cut, temperature=1.0, seeds=None):
    """Decode a response to each question about its clip: in training, evaluation and use.
    questions: objects with .question and .choices; waves: their clips, (N,); listen(wave, start_s,
    end_s) -> the waveform that is heard, listen=None: nothing is, text reasoning; temperature 0 is
    greedy; seeds: one, a number or a tuple, for each response; None: afresh. -> Rollouts."""
    rows = []
    room = model.decoder.config.max_position_embeddings // 2  # the rest: for the response
    seeds = seeds or [None] * len(waves)
    first_listens = model.hear(waves, first_listen=True)
    for features, q, wave, seed in zip(first_listens, questions, waves, seeds, strict=True):
        prompt = model.prompt(features, q.question, q.choices)
        rows.append(Rollout(prompt, wave, np.random.default_rng(seed)))
        if len(prompt.ids) > room:
            rows[-1].ended = "prompt too long"  # so is its whole group: advantage 0
    # for speed alone: autocast drops its bf16 copies of the weights when the outermost context
    # ends; this one, itself off, keeps them from token to token
    with torch.autocast(model.device.type, enabled=False):
        decode(model, [row for row in rows if not row.ended], listen, temperature)
    return rows


def decode(model, rows, listen, temperature):
    """Write the responses of a batch in one KV cache. A pass feeds each row what the cache lacks of
    it, padded on the left: its prompt, then the id sampled last, audio, both, or nothing. 25 audio
    tokens for one are 25 columns of padding for all: so a row that asks waits until all have asked
    or ended, twice as fast as at once."""
    cache = transformers.DynamicCache(config=model.decoder.config)
    mask = torch.zeros(len(rows), 0, dtype=torch.long, device=model.device)
    while rows:
        x, new_mask = model.embed([row.sample for row in rows], [row.cached for row in rows])
        mask = torch.cat([mask, new_mask], 1)
        hidden = model.hidden(x, mask, cache)[:, -1]                             # (rows, D)
        for row in rows:
            row.cached = len(row.sample.ids)
        running = [k for k, row in enumerate(rows) if not row.waiting]
        active = [rows[k] for k in running]  # padded on the left, their last column is real
        tokens, logprobs = sample_tokens(model.logits(hidden[running]), active, temperature)
        for row, token, logp in zip(active, tokens, logprobs):
            add_token(model, row, token, logp, listen)
        stay = torch.tensor([not row.ended for row in rows], device=model.device)
        if not stay.all():  # an ended row leaves the batch: 1.5 times as fast
            rows = [row for row in rows if not row.ended]
            mask = mask[stay]
            cache.batch_select_indices(stay)
        if all(row.waiting for row in rows):
            listen_again(model, rows, listen)


def add_token(model, row, token, logp, listen):
    """Append a sampled id. If its text closes a segment, the row waits for the audio, which goes
    after this id, even if the token goes on: "</seg>," may end in one token ">,"."""
    row.sample.add([token], trained=True)
    row.logprobs.append(logp)
    if token == model.tokenizer.eos_token_id:
        row.ended = "eos"
        return
    row.text = model.tokenizer.decode(row.sample.sampled)  # anew: a letter may be two ids
    if len(row.logprobs) >= model.config.max_new_tokens:
        row.ended = "length"
    tags = [tag for _, tag in split_segments(row.text)[0]]
    if len(tags) == len(row.segments):
        return
    duration_s = len(row.wave) / SAMPLE_RATE
    segment = parse_segment(tags[-1], duration_s, len(row.heard_segments), model.config)
    if not segment.refused and not listen:
        segment.refused = "text reasoning"
    if not segment.refused and row.ended:
        segment.refused = "at the limit of tokens"
    row.segments.append(segment)
    segment.heard = not segment.refused  # the audio follows in listen_again()
    row.waiting = segment.heard          # after a refused one the text just goes on


def listen_again(model, rows, listen):
    """Append what each waiting row asked to hear: x' = x + o + enc(A[s:e]) of the paper."""
    asked = [row.segments[-1] for row in rows]
    pieces = [listen(row.wave, s.start_s, s.end_s) for row, s in zip(rows, asked)]
    for row, features in zip(rows, model.hear(pieces)):  # no first listen: at the full rate
        row.sample.add_audio(features)
        row.waiting = False


# =============================================================================== 5 the four rewards
def extract_answer(text):
    """What stands in the one <answer> block, or None. There is no fall-back."""
    blocks = re.findall("<answer>(.*?)</answer>", text, re.S)
    return blocks[0].strip() if len(blocks) == 1 else None


def is_right(text, answer):
    """Is this the text's answer, but for case, outer punctuation and spacing?"""
    extracted = extract_answer(text)
    return extracted is not None and same_answer(extracted, answer)


def format_reward(text):
    """0.5 for exactly one well-formed think block, then exactly one answer block."""
    match = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.S)
    return 0.5 if match and not re.search("</?(think|answer)>", match[1] + match[2]) else 0.0


def consistency_reward(text):
    """-0.1 for every </seg> after which the sentence does not go on: a capital or a tag comes next
    (the paper), or no word before the next tag or the end (here); at least -0.5."""
    after = [part.split("<")[0].strip() for part in text.split("</seg>")[1:]]  # up to the next tag
    broken_off = sum(not re.search(r"\w", said) or said[0].isupper() for said in after)
    return max(-0.5, -0.1 * broken_off)


def paper_reward(rollout, answer):
    """The four rewards of the paper, by name; their sum lies between -0.5 and 1.5."""
    right = is_right(rollout.text, answer)
    return {"format": format_reward(rollout.text),
            "consistency": consistency_reward(rollout.text),
            "accuracy": 0.5 * right,
            "segment": 0.5 * (right and bool(rollout.heard_segments))}  # one is enough


# =========================================================================================== 6 GRPO
@dataclass
class GRPO:
    group: int = 8              # responses to a question, as in the paper
    temperature: float = 1.0    # of the rollouts, as in the paper
    mini_batches: int = 1       # updates a step; the paper: 2; with 1 the ratio stays 1
    clip_ratio: float = 0.2     # as in the paper
    kl_weight: float = 0.04     # of k3 against the SFT policy, as in the paper
    micro_batch: int = 8        # responses in one pass; gradients are accumulated over them


def group_advantages(rewards, eps=1e-4):
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group: (questions, G) -> (questions, G).
    A flat group, its rewards all equal, gets 0, but for rounding, and teaches nothing."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    return (rewards - mean) / (std + eps)


def grpo_loss(logp, old_logp, ref_logp, advantage, grpo):
    """The GRPO objective of each token (arXiv 2402.03300, eq. 3 and 4) as a loss; all are (n,).
    Returns loss, k3, and whether the clipped term was the smaller one."""
    ratio = torch.exp(logp - old_logp)
    clip = grpo.clip_ratio
    free = ratio * advantage
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantage
    # never negative, and its mean is KL(policy || reference)
    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return -torch.minimum(free, bounded) + grpo.kl_weight * k3, k3, (bounded < free).float()


def grpo_step(policy, reference, optimizer, questions, waves, seeds, grpo, listen=cut,
              reward=paper_reward):
    """Stage 2, one step: roll out, reward, compare within each group, update. questions: objects
    with .question, .choices and .answer; seeds: one for each response, question by question.
    Returns the Rollouts, their rewards by name, and metrics."""
    questions = [q for q in questions for _ in range(grpo.group)]
    waves = [wave for wave in waves for _ in range(grpo.group)]
    responses = rollouts(policy, questions, waves, listen, grpo.temperature, seeds)
    parts = [reward(r, q.answer) for r, q in zip(responses, questions)]
    rewards = torch.tensor([sum(part.values()) for part in parts]).view(-1, grpo.group)
    advantages = group_advantages(rewards).flatten().to(policy.device)
    metrics = grpo_update(policy, reference, optimizer, responses, advantages, grpo)
    return responses, parts, metrics


def grpo_update(policy, reference, optimizer, responses, advantages, grpo):
    """`grpo.mini_batches` updates, each on its share of a step's responses: in the first one the
    ratio is 1. advantages: (responses,). What was sampled is trained: ids are never tokenised
    again, inserted audio has no loss, eos has one. Returns means over the tokens trained, the
    entropy estimated by -log p."""
    def logp_of(model, batch):
        return model([responses[i].sample for i in batch], grpo.temperature)

    shares = np.array_split(np.arange(len(responses)), grpo.mini_batches)
    # Of each update, micro-batches of indices. A response without an advantage (1e-3: rounding), as
    # in a flat group, would add its KL alone. It is left out, not so in the paper: 1.8x as fast.
    updates = [batches([i for i in share if abs(advantages[i]) > 1e-3], grpo.micro_batch)
               for share in shares]
    # Old log-probs: of the policy before the first update, so in that one its own. Not those of
    # decoding, whose rounding differs, in bf16 by too much for a ratio (logp_gap). (tokens,), by
    # the first response of a micro-batch:
    with torch.no_grad():
        old_logps = {batch[0]: logp_of(policy, batch) for update in updates[1:] for batch in update}
    seen = {name: [] for name in ("loss", "kl", "clip_share", "entropy", "logp_gap")}
    for share, update in zip(shares, updates):
        n_responses = sum_over_processes(len(share))
        for batch in update:
            logp = logp_of(policy, batch)
            old_logp = old_logps.get(batch[0], logp.detach())
            with torch.no_grad():
                ref_logp = logp_of(reference, batch)
            lengths = [len(responses[i].logprobs) for i in batch]
            advantage = torch.cat([advantages[i].repeat(n) for i, n in zip(batch, lengths)])
            loss, k3, clipped = grpo_loss(logp, old_logp, ref_logp, advantage, grpo)
            # the paper's mean: over a response's tokens, then over all responses, left out or not
            (sum(part.mean() for part in loss.split(lengths)) / n_responses).backward()
            decoded = torch.cat([logp.new_tensor(responses[i].logprobs) for i in batch])
            for name, x in {"loss": loss, "kl": k3, "clip_share": clipped, "entropy": -decoded,
                            "logp_gap": (old_logp - decoded).abs()}.items():
                seen[name] += x.tolist()
        optimizer_step(optimizer)
    n = sum_over_processes(len(seen["loss"])) or 1
    return {name: sum_over_processes(sum(values)) / n for name, values in seen.items()}


# ========================================================= The method ends here; plumbing follows.

torch.backends.cuda.enable_cudnn_sdp(False)  # bf16 gradients of NaN (torch 2.11)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class EchoError(Exception):
    """A mistake that the user can mend: what was wrong, where, and what to do, in one line."""


def same_answer(a, b):
    """Are two answers the same? Case, outer punctuation and spacing don't count."""
    a, b = (" ".join(s.casefold().split()).strip(" .,;:!?\"'") for s in (a, b))
    return a == b


def sample_tokens(logits, rows, temperature):
    """The next token of each row and its log-prob: two lists. logits: (rows, V). Sampled by the
    inverse of the cumulated probabilities: a row draws one number, whatever its neighbours do."""
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if not logp.isfinite().any(-1).all():
        raise EchoError("the model's logits are not numbers; its training went wrong")
    if temperature:
        total = logp.exp().cumsum(-1)
        draw = torch.tensor([[row.draws.random()] for row in rows]).to(total)
        token = torch.searchsorted(total, draw * total[:, -1:], right=True)
        token = token.clamp_max(logp.shape[1] - 1)
    else:
        token = logp.argmax(-1, keepdim=True)
    return token[:, 0].tolist(), logp.gather(1, token)[:, 0].tolist()


def batches(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


def optimizer_step(optimizer, max_norm=1.0):
    """One step, on the gradient summed over processes and clipped; none if the gradient is 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if torch.distributed.is_initialized():
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if not norm.isfinite():
        raise EchoError("the gradient is not finite; start again with a lower learning rate")
    if norm > 0:
        optimizer.step()
    optimizer.zero_grad()


def sum_over_processes(number):
    """The sum of a number over all processes, if there are several."""
    if not torch.distributed.is_initialized():
        return number
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(number, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item()


# ================================================================================ 7 audio encoders
class SmallEncoder(nn.Module):
    """(B, N) -> (B, n, dim), a token for each begun 40 ms, or half second of a thumbnail: log-mel,
    two strided convolutions (100 frames a second -> 25 tokens), and a recurrent network in both
    directions, which counts better than attention. A thumbnail averages mel POWER over half a
    second before that: what changes within one can't be read from it."""
    HOP = 160  # samples, 10 ms

    def __init__(self, dim=96, layers=2, n_mels=40):
        super().__init__()
        self.dim = dim
        self.mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=400, hop_length=self.HOP, n_mels=n_mels, pad_mode="constant")
        self.conv1 = nn.Conv1d(n_mels, dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.gru = nn.GRU(dim, dim // 2, layers, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, waves, thumbnail):
        power = self.mel(waves)[..., :math.ceil(waves.shape[1] / self.HOP)]  # (B, n_mels, frames)
        if thumbnail:
            power = F.avg_pool1d(power, 100 // THUMBNAIL_RATE, ceil_mode=True)
            power = power.repeat_interleave(4, dim=2)       # of 4 frames the convolutions make one
        x = power.clamp_min(1e-6).log10() + 2                          # about centred on 0
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).transpose(1, 2)  # (B, n, dim)
        return self.norm(self.gru(x)[0])


class WhisperEncoder(nn.Module):
    """The encoder of a Whisper checkpoint, pooled to 25 tokens a second. It keeps its windows of
    30 s, padding included: it attends to the padding, and without it the tokens would not be those
    it was trained to give. A thumbnail averages mel power as above, at the end with padding."""

    def __init__(self, whisper, extractor):
        super().__init__()
        self.whisper, self.extractor = whisper, extractor
        self.dim = whisper.config.d_model

    def window(self, wave, thumbnail):
        """At most 30 s, (N,) -> (n, dim)."""
        features = self.extractor(wave.cpu().numpy(), sampling_rate=SAMPLE_RATE,
                                  return_tensors="pt").input_features  # (1, n_mels, 3000)
        if thumbnail:
            power = 10 ** (4 * (features - 1))  # features: log10(power) / 4 + 1, 100 a second
            size = 100 // THUMBNAIL_RATE
            power = F.avg_pool1d(power, size).repeat_interleave(size, dim=2)
            features = power.log10() / 4 + 1
        rate = THUMBNAIL_RATE if thumbnail else TOKENS_PER_SECOND
        x = self.whisper(features.to(wave.device)).last_hidden_state   # (1, 1500, dim), 50 a second
        x = F.avg_pool1d(x.transpose(1, 2), 50 // rate)[0].T
        return x[:math.ceil(len(wave) * rate / SAMPLE_RATE)]

    def forward(self, waves, thumbnail):
        size = self.extractor.n_samples
        return torch.stack([torch.cat([self.window(part, thumbnail) for part in wave.split(size)])
                            for wave in waves])


# ================================================================================== 8 save and load
def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def read_decoder(name):
    """A Qwen2 checkpoint, a name or a local folder -> decoder in fp32, tokenizer."""
    try:
        decoder = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attention_dropout=0.0)
        # not AutoTokenizer: for Qwen2 it builds Qwen's own, even where another one was saved
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise EchoError(f"{name}: {first_line(error)}") from None
    if decoder.config.model_type != "qwen2":
        raise EchoError(f"{name}: a {decoder.config.model_type} model; needed: a Qwen2 checkpoint")
    return decoder, tokenizer


def read_whisper(name):
    """A Whisper checkpoint, a name or a local folder -> WhisperEncoder."""
    whisper = transformers.WhisperModel.from_pretrained(name, dtype=torch.float32).encoder
    return WhisperEncoder(whisper, transformers.WhisperFeatureExtractor.from_pretrained(name))


def save(model, folder):
    """Write a model's folder whole or not at all: decoder and tokenizer as transformers saves them,
    Whisper's settings in encoder/, all other weights in echo.pt, Config in echo.json."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}
    try:
        model.decoder.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        if isinstance(model.encoder, WhisperEncoder):
            model.encoder.whisper.config.save_pretrained(temporary / "encoder")
            model.encoder.extractor.save_pretrained(temporary / "encoder")
        torch.save(rest, temporary / "echo.pt")
        (temporary / "echo.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    except Exception as error:  # for a full disk each library has its own
        raise EchoError(f"{folder}: can't be written ({first_line(error)})") from None
    os.sync()  # all of it is on the disk before it has its name
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load(folder, device="cpu"):
    """The model that save() wrote to a folder, or to the folder's model/."""
    folder = Path(folder)
    folder = folder if (folder / "echo.json").is_file() else folder / "model"
    if not (folder / "echo.json").is_file():
        raise EchoError(f"{folder.parent}: no Echo checkpoint there (no echo.json); train one")
    config = Config(**json.loads((folder / "echo.json").read_text()))
    encoder = SmallEncoder()
    if config.encoder != "small":
        settings = transformers.WhisperConfig.from_pretrained(folder / "encoder")
        whisper = transformers.WhisperForAudioClassification(settings).encoder  # has no decoder
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder / "encoder")
        encoder = WhisperEncoder(whisper, extractor)
    model = Echo(config, encoder, *read_decoder(folder))
    rest = torch.load(folder / "echo.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(model.state_dict() | rest)
    return model.to(device)


# ========================================================================== 9 flags and processes
def parse_settings(cls, doc, defaults={}):
    """Flags for the fields of a dataclass: --a-b for a field a_b, --no-a-b for a bool that is true.
    --help prints the dataclass itself, comments and all. defaults: instead of its own."""
    def fail(message):
        raise EchoError(f"{message} (--help lists the settings)")
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    classes = [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    parser.format_help = lambda: "\n".join([doc, *map(inspect.getsource, classes)])
    parser.error = fail
    parser.set_defaults(**defaults)
    settings, rest = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False)
    if rest:
        fail(f"unknown: {' '.join(rest)}")
    for f in dataclasses.fields(cls):
        value = getattr(settings, f.name)
        least = int(type(f.default) is int and f.default > 0)  # what is 0 by default may be 0
        if type(value) in (int, float) and not value >= least:
            fail(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    return settings


def main(run):
    """Run a script; a user's mistake ends it with one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no letter ends a run
    try:
        sys.exit(run())
    except (EchoError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def pick_device(train=False):
    """The device of this process, a GPU if there is one; for a training under torchrun the
    processes find each other."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if train and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def processes():
    """This process's rank, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
