"""Echo in one file: an audio language model that listens again while it reasons (arXiv 2602.11909).

The whole method, where A is a clip and q a question about it:

    x = prompt(A, q)                # the clip, heard once (by default coarsely), and the question
    until the response o ends with eos (or is too long):
        o += sample(policy(x + o))  # one token of text
        if o closes <seg>s, e</seg>:
            o += enc(A[s:e])        # hear that part of the ORIGINAL waveform at the full rate
    R     = format + consistency + accuracy + segment  # the four rewards of a response
    adv   = (R - mean R) / std R                       # within the group of one question
    for each sampled token of o, not for its audio (GRPO, arXiv 2402.03300):
        ratio = p / p_old                              # p_old: before the step's updates
        k3    = exp(d) - d - 1, d = log p_ref - log p  # estimates the KL to the SFT policy
        loss  = -min(ratio adv, clamp(ratio) adv) + kl_weight k3
    minimise the mean over responses of the mean over a response's sampled tokens

A response is plain text with tags in it. Stage 1 learns from chains of thought like this one:

    <think>the hum <seg>1.0, 2.5</seg> the hum has two pulses.</think><answer>two</answer>

Stage 1, SFT, teaches to write such tags. As in the paper no audio follows a tag in it, so the model
learns where to point, not yet how to use what it hears there. It starts from a pretrained audio
model, which understands short clips already; for the toy, synthetic sounds, train_sft.py makes one.
Stage 2, RL, inserts the audio and rewards the result. A training repeats, for stage 1,

    prompt = policy.prompt(policy.hear([wave], first_listen=True)[0], question, choices)
    sample = policy.add_response(prompt, chain)
    sft_loss(policy, [sample, ...]).backward()     # the samples of a batch
    optimizer_step(optimizer)                      # of the weights that require a gradient

and for stage 2, with a frozen copy of the SFT policy as the reference,

    grpo_step(policy, reference, optimizer, questions, waves, seeds, GRPO())

Learning rates and batches are in train_sft.py and train_rl.py, the chains come from make_data.py.
The method ends after section 6, GRPO. Small helpers that it uses (batches, means, find_choice, ...)
follow it; section 7 has the two encoders.
"""
# SPDX-License-Identifier: MIT
import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import sys
import typing
import warnings
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
THUMBNAIL_RATE = 2      # tokens a second of a coarse first listen, a thumbnail: it averages the
                        # sound's power over half a second, so finer detail is lost


@dataclass
class Config:
    """What a model is; saved with its weights."""
    encoder: str = "small"        # SmallEncoder; or a Whisper checkpoint: a name or a local folder
    decoder: str = "tiny"         # made in train_sft.py; or a Qwen checkpoint: a name or a folder
    thumbnail: bool = True        # the first listen is a thumbnail, so that listening again finds
                                  # something new; False: it is at the full rate, as in the paper
    min_segment_s: float = 0.2    # shorter segments are not inserted, as in the paper
    max_segment_s: float = 30.0   # our choice: one window of Whisper
    end_slack_s: float = 0.5      # our choice: an end at most this far past the clip is moved to
                                  # the clip's end, since Echo.prompt says of a clip of 5.7 s that
                                  # it ends at 6.0; the paper's code moves any end
    max_turns: int = 8            # segments heard in one response, as in the paper
    max_new_tokens: int = 100     # sampled tokens of a response, our choice for the toy


# =================================================================================== 1 segment tags
@dataclass
class Segment:
    """What a pair of tags asked for, and whether it is heard."""
    tag: str
    start_s: float | None = None
    end_s: float | None = None
    heard: bool = False
    refused: str | None = None  # why it is not heard


NUMBER = r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*"
TAG = re.compile(f"<seg>{NUMBER},{NUMBER}</seg>")  # <seg>2, 2.5</seg>


def split_segments(text):
    """Take a text apart at its closed tags: [(text before, "<seg>...</seg>"), ...], the rest. A tag
    begins at the last <seg> before its </seg>; without one it is "</seg>" itself, a malformed tag.
    """
    *parts, rest = text.split("</seg>")
    pairs = []
    for part in parts:
        at = part.rfind("<seg>")
        if at < 0:  # no <seg>: the tag is </seg> alone
            at = len(part)
        pairs.append((part[:at], part[at:] + "</seg>"))
    return pairs, rest


def parse_segment(tag, duration_s, turns=0, config=Config()):
    """A closed tag -> Segment. It never raises. An end just past the clip is moved to its end first
    (Config.end_slack_s); then `refused` is the first of these that holds: "malformed" (the times
    stay None), "outside the clip" (start or end), "reversed", "too short", "too long", "too many
    turns". duration_s: of the clip; turns: how many segments this response has heard before."""
    match = TAG.fullmatch(tag)
    if not match:
        return Segment(tag, refused="malformed")
    start_s, end_s = map(float, match.groups())
    if duration_s < end_s <= duration_s + config.end_slack_s:
        end_s = duration_s
    length_s = round(end_s - start_s, 6)  # in floats 0.3 - 0.1 < 0.2
    segment = Segment(tag, start_s, end_s)
    if max(start_s, end_s) > duration_s:
        segment.refused = "outside the clip"
    elif length_s < 0:
        segment.refused = "reversed"
    elif length_s < config.min_segment_s:
        segment.refused = "too short"
    elif length_s > config.max_segment_s:
        segment.refused = "too long"
    elif turns >= config.max_turns:
        segment.refused = "too many turns"
    return segment


# ================================================================= 2 text and audio in one sequence
AUDIO = -1  # stands in the ids where an audio token does; no id of any vocabulary


@dataclass
class Sample:
    """Text and audio as one sequence: the input of SFT, of a rollout and of its update."""
    ids: list = field(default_factory=list)       # token ids, AUDIO for each audio token
    trained: list = field(default_factory=list)   # True where a loss applies: the response in SFT,
                                                  # sampled ids in RL
    audio: list = field(default_factory=list)     # features (encoder dim,) at AUDIO, else None

    def add(self, ids, trained=False, audio=None):
        """Append ids, or audio tokens with their features; returns the sample."""
        if audio is None:
            audio = [None] * len(ids)
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.audio += audio
        return self

    def add_audio(self, features):
        """Append an audio token for each row of `features` (n, encoder dim). The decoder tells them
        from text without any marker."""
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
    """Audio encoder, projector and a Qwen decoder; enc(.) of the paper is encoder, then projector.
    The encoder is frozen in both stages: its weights are Whisper's, or those of a sound-event
    detector, which train_sft.py trains first. The projector and the decoder are trained, except
    the embeddings and the head of a Qwen checkpoint, since no token is added: tags are spelled with
    ordinary ones."""

    def __init__(self, config, encoder, decoder, tokenizer):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.tokenizer, self.bf16 = tokenizer, False  # the scripts set bf16
        self.tokenize = functools.lru_cache(2 ** 16)(  # texts repeat: prompts are built 5x faster
            lambda text: tokenizer(text, add_special_tokens=False,
                                   split_special_tokens=True).input_ids)  # no eos in the middle
        self.projector = nn.Linear(encoder.dim, decoder.config.hidden_size)
        self.encoder.requires_grad_(False)
        for table in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
            table.requires_grad_(config.decoder == "tiny")
        self.eval()  # in training, too: no layer uses dropout

    @property
    def device(self):
        return self.projector.weight.device

    @property
    def first_rate(self):
        """Audio tokens a second of a first listen."""
        return THUMBNAIL_RATE if self.config.thumbnail else TOKENS_PER_SECOND

    @torch.no_grad()
    def hear(self, waves, first_listen=False):
        """Waveforms (N_i,) on the CPU -> features (n_i, encoder dim), which embed() projects. Clips
        of equal length are encoded as one batch, so that none is padded for another, and
        duplicates once: rollouts are 1.2x faster."""
        keys = [wave.numpy().tobytes() for wave in waves]
        features = {}
        for size in {len(wave) for wave in waves}:  # a batch of the clips of each length
            distinct = {key: wave for key, wave in zip(keys, waves) if len(wave) == size}
            batch = torch.stack(list(distinct.values())).to(self.device)
            encoded = self.encoder(batch, thumbnail=first_listen and self.config.thumbnail)
            features.update(zip(distinct, encoded))
        return [features[key] for key in keys]

    def prompt(self, features, question, choices=()):
        """What a response continues: the first listen, its times as text, and the question.
            [audio]0.0[audio]0.5 ... [audio]5.5 6.0 How many pulses has the hum? Choose from ...
            [audio]0.0[24 x audio][audio]1.0[24 x audio] ...                    (at the full rate)
        features: (n, encoder dim) of the first listen; [] without a clip, as in a part of the
        toy's pretraining. A time stands behind the token that begins then; the last number is the
        end of the last token."""
        sample = Sample()
        every = 1 if self.config.thumbnail else TOKENS_PER_SECOND  # audio tokens for each time
        features = list(features)
        for i in range(0, len(features), every):
            sample.add_audio(features[i:i + 1])
            sample.add(self.tokenize(f"{i / self.first_rate:.1f}"))
            sample.add_audio(features[i + 1:i + every])  # the rest of a second; of thumbnails none
        if len(features):
            sample.add(self.tokenize(f" {len(features) / self.first_rate:.1f}"))
        if choices:
            listed = json.dumps(choices, ensure_ascii=False)  # quoted: a choice may hold a comma
            question = f"{question} Choose from {listed}."
        return sample.add(self.tokenize(f" {question}\n"))

    def add_response(self, sample, text):
        """Append to the prompt, in place, a whole response to learn, with eos."""
        return sample.add(self.tokenize(text) + [self.tokenizer.eos_token_id], trained=True)

    def embed(self, samples, n_cached=None):
        """Embeddings x (B, T, D) of each sample's ids and audio, padded on the left; and the mask
        (B, T) of what is no padding. n_cached: how many ids of each sample the KV cache of
        decode() holds already; only those after them are embedded."""
        n_cached = n_cached or [0] * len(samples)
        new = [s.ids[n:] for s, n in zip(samples, n_cached)]
        audio = [a for s, n in zip(samples, n_cached) for a in s.audio[n:] if a is not None]
        ids = pad_left(new, self.device)
        x = self.decoder.get_input_embeddings()(ids.clamp_min(0))  # AUDIO: replaced below
        if audio:  # it fills the gaps in reading order
            x = x.masked_scatter((ids == AUDIO)[..., None], self.projector(torch.stack(audio)))
        return x, pad_left([[1] * len(row) for row in new], self.device)

    def hidden(self, x, mask, cache=None):
        """(B, T, D) embeddings -> last hidden states (B, T, D). mask (B, cached + T) marks the real
        tokens; padding also stands between them, where decode() fed a row less than others. Real
        tokens have the positions 0, 1, 2, ..., text and audio alike: mask 0 1 1 0 1 has positions
        0 0 1 1 2. Padding is masked, so its own position does not matter."""
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, -x.shape[1]:]  # of the new columns
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.decoder.model(
                inputs_embeds=x, attention_mask=mask, position_ids=position, past_key_values=cache,
                use_cache=cache is not None).last_hidden_state

    def logits(self, hidden):
        """(..., D) -> (..., V), in fp32: bf16 logits of 16 to 32 are 0.125 apart, which is too
        coarse for a ratio of probabilities."""
        return self.decoder.lm_head(hidden.float())

    def forward(self, samples, temperature=1.0):
        """Log-probs of the trained tokens of each sample: a list of (n_i,)."""
        hidden = self.hidden(*self.embed(samples))
        ids = pad_left([s.ids for s in samples], self.device)[:, 1:]
        trained = pad_left([s.trained for s in samples], self.device)[:, 1:] > 0
        before = hidden[:, :-1]                                  # position t - 1 predicts t
        logits = self.logits(before[trained]) / temperature      # (trained tokens, V)
        logp = -F.cross_entropy(logits, ids[trained], reduction="none")
        return logp.split([sum(s.trained) for s in samples])


def sft_loss(model, samples, n_tokens=None):
    """Stage 1: the mean of -log p over the trained tokens. n_tokens: how many the whole batch has,
    on all processes, if these samples are a part of it."""
    logp = torch.cat(model(samples))
    return -logp.sum() / (n_tokens or len(logp))


# =========================================================================== 4 interleaved decoding
@dataclass
class Rollout:
    """A response while it is written, and its trace afterwards."""
    sample: Sample              # the prompt, then sampled ids and inserted audio
    wave: torch.Tensor          # the original clip, (N,)
    draws: np.random.Generator  # this row's own, so that it does not depend on its neighbours
    text: str = ""              # the sampled text, without eos
    logprobs: list = field(default_factory=list)  # log-prob of each sampled id when it was sampled
    segments: list = field(default_factory=list)  # a Segment for each </seg>
    waiting: list = field(default_factory=list)   # those of them whose audio is not inserted yet
    ended: str | None = None    # "eos", "length", or "prompt too long": then there is no response
    cached: int = 0             # how many ids are in the KV cache
    advantage: float = 0.0      # of its reward within its group
    old_logp: torch.Tensor | None = None  # log-probs of the policy before the step's updates, set
                                          # by grpo_update

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
    end_s) -> the waveform that is heard; listen=None: text reasoning, nothing is heard again;
    temperature 0 is greedy; seeds: a number or a tuple for each response. Returns Rollouts."""
    seeds = seeds or [None] * len(waves)
    rows = [Rollout(Sample(), wave, np.random.default_rng(seed))
            for wave, seed in zip(waves, seeds, strict=True)]
    for row in rows:
        if len(row.wave) / SAMPLE_RATE * model.first_rate > room(model, row.wave):
            row.ended = "prompt too long"  # by its audio alone, which is not encoded then
    fitting = [(row, q) for row, q in zip(rows, questions, strict=True) if not row.ended]
    first_listens = model.hear([row.wave for row, _ in fitting], first_listen=True)
    for (row, q), features in zip(fitting, first_listens):
        row.sample = model.prompt(features, q.question, q.choices)
        if len(row.sample.ids) > room(model, row.wave):
            row.ended = "prompt too long"
    # For speed alone: autocast clears its bf16 copies of the weights where the outermost context
    # ends. This one does nothing else than to be the outermost, so that they last.
    with torch.autocast(model.device.type, enabled=False):
        decode(model, [row for row in rows if not row.ended], listen, temperature)
    return rows


def room(model, wave):
    """How many tokens a prompt may have: the decoder's context without the longest response and the
    longest segments of the clip that it may hear."""
    segment_s = min(model.config.max_segment_s, len(wave) / SAMPLE_RATE)
    heard = model.config.max_turns * math.ceil(segment_s * TOKENS_PER_SECOND)
    return model.decoder.config.max_position_embeddings - model.config.max_new_tokens - heard


def sample_tokens(logits, rows, temperature):
    """The next token of each row and its log-prob: two lists. logits: (rows, V). A row draws one
    random number and looks it up in the cumulated probabilities; temperature 0 takes the likeliest.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if not logp.isfinite().any(-1).all():
        raise EchoError("the model's logits are not numbers: its training went wrong, or the "
                        "temperature is too low")
    if temperature:
        total = logp.exp().cumsum(-1)
        draw = torch.tensor([[row.draws.random()] for row in rows]).to(total)
        draw = draw * total[:, -1:]  # the last total is 1 but for rounding
        token = torch.searchsorted(total, draw, right=True).clamp_max(logp.shape[1] - 1)
    else:
        token = logp.argmax(-1, keepdim=True)
    return token[:, 0].tolist(), logp.gather(1, token)[:, 0].tolist()


def decode(model, rows, listen, temperature):
    """Write the responses of a batch, in place, in one KV cache. rows: Rollouts with a prompt.
    1. Feed each row the ids and audio that the cache lacks of it: in the first pass its prompt,
       later the id sampled last, the audio inserted since, both, or, while it waits, nothing.
       Rows with less are padded on the left; the mask knows all padding.
    2. Each row that does not wait for audio samples an id (add_token). Ended rows leave the batch,
       the mask and the cache (a transformers.DynamicCache has batch_select_indices for that).
    3. If now all rows wait for audio, insert it for all of them (listen_again). To insert a row's
       audio as soon as it asks takes twice as long, since it pads all other rows."""
    cache = transformers.DynamicCache(config=model.decoder.config)
    mask = torch.zeros(len(rows), 0, dtype=torch.long, device=model.device)
    while rows:
        x, new_mask = model.embed([row.sample for row in rows], [row.cached for row in rows])
        mask = torch.cat([mask, new_mask], 1)
        hidden = model.hidden(x, mask, cache)[:, -1]                             # (rows, D)
        for row in rows:
            row.cached = len(row.sample.ids)  # without the id that is sampled now
        active = [k for k, row in enumerate(rows) if not row.waiting]
        logits = model.logits(hidden[active])  # padded on the left, an active row's last is real
        tokens, logprobs = sample_tokens(logits, [rows[k] for k in active], temperature)
        for k, token, logp in zip(active, tokens, logprobs):
            add_token(model, rows[k], token, logp, listen)
        stay = torch.tensor([not row.ended for row in rows], device=model.device)
        if not stay.all():
            rows = [row for row in rows if not row.ended]
            mask = mask[stay]
            cache.batch_select_indices(stay)
        if all(row.waiting for row in rows):
            listen_again(model, rows, listen)


def add_token(model, row, token, logp, listen):
    """Append a sampled id and its log-prob. Eos, which is not in the text, or else the limit of
    tokens ends the row. Each tag that this id closed becomes a Segment. It is refused for a reason
    of parse_segment's, else as "text reasoning" if `listen` is None, else as "at the limit of
    tokens" if the row ended. A refused tag gets no audio, the text goes on as in the paper. Any
    other waits for its audio; it is marked as heard already, so that a second tag that the same id
    closes counts it. The audio goes behind the whole id: "</seg>," may end in one token ">,"."""
    row.sample.add([token], trained=True)
    row.logprobs.append(logp)
    if token == model.tokenizer.eos_token_id:
        row.ended = "eos"
        return
    row.text = model.tokenizer.decode(row.sample.sampled)  # anew: a letter may be two ids
    if len(row.logprobs) >= model.config.max_new_tokens:
        row.ended = "length"
    tags = [tag for _, tag in split_segments(row.text)[0]]
    for tag in tags[len(row.segments):]:  # those that this id closed
        duration_s = len(row.wave) / SAMPLE_RATE
        segment = parse_segment(tag, duration_s, len(row.heard_segments), model.config)
        if not segment.refused and not listen:
            segment.refused = "text reasoning"
        if not segment.refused and row.ended:
            segment.refused = "at the limit of tokens"
        row.segments.append(segment)
        if not segment.refused:
            segment.heard = True
            row.waiting.append(segment)


def listen_again(model, rows, listen):
    """Append what each waiting row asked to hear, `listen` of the original clip, at the full rate,
    in the order of its tags; then it waits no more. x' = x + o + enc(A[s:e]) of the paper."""
    asked = [(row, segment) for row in rows for segment in row.waiting]
    pieces = [listen(row.wave, s.start_s, s.end_s) for row, s in asked]
    for (row, _), features in zip(asked, model.hear(pieces)):  # no first listen: at the full rate
        row.sample.add_audio(features)
    for row in rows:
        row.waiting = []


# =============================================================================== 5 the four rewards
def extract_answer(text):
    """What stands in the one <answer> block; None if there is none, or several."""
    blocks = re.findall("<answer>(.*?)</answer>", text, re.S)
    return blocks[0].strip() if len(blocks) == 1 else None


def is_right(text, question):
    """Does the text give the question's answer, one of its choices? find_choice tells which choice
    a text means: it compares exactly, else but for case and how many spaces, else also without
    quotes around it and punctuation behind it. Without choices nothing is right."""
    said = extract_answer(text)
    return said is not None and find_choice(said, question.choices) == question.answer


def format_reward(text):
    """0.5 for exactly one think block, then exactly one answer block, and else only white space."""
    match = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.S)
    return 0.5 if match and not re.search("</?(think|answer)>", match[1] + match[2]) else 0.0


def consistency_reward(text):
    """-0.1 for every </seg> after which the sentence does not go on, but never below -0.5. It goes
    on in "</seg> the hum has" (and counts as going on in "</seg>. The hum"). It does not in
    "</seg> The hum" (a capital) and "</seg> <seg>" (a tag), as in the paper, nor, our addition, in
    "</seg>. <seg>" or "</seg>." at the end (no word)."""
    after = [part.split("<")[0].strip() for part in text.split("</seg>")[1:]]  # up to the next tag
    broken_off = sum(not re.search(r"\w", said) or said[0].isupper() for said in after)
    return max(-0.5, -0.1 * broken_off)


def paper_reward(rollout, question):
    """The four rewards of the paper, by name; together -0.5 to 1.5. accuracy: 0.5 for the right
    answer; segment: 0.5 more if it is right and at least one segment was heard."""
    right = is_right(rollout.text, question)
    return {"format": format_reward(rollout.text),
            "consistency": consistency_reward(rollout.text),
            "accuracy": 0.5 * right,
            "segment": 0.5 * (right and bool(rollout.heard_segments))}


# =========================================================================================== 6 GRPO
@dataclass
class GRPO:
    group: int = 8              # responses to a question, as in the paper
    temperature: float = 1.0    # of the rollouts, as in the paper
    mini_batches: int = 1       # updates a step. In the first p is still p_old: the ratio is 1, its
                                # gradient matters, nothing is clipped. The paper has a second.
    clip_ratio: float = 0.2     # as in the paper
    kl_weight: float = 0.04     # of k3 against the SFT policy, as in the paper
    micro_batch: int = 8        # responses in one pass; gradients are accumulated over them


def group_advantages(rewards, eps=1e-4):
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group: (questions, G) -> (questions, G);
    std divides by G. A flat group, whose rewards are all equal, gets exactly 0, which grpo_update
    looks for."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    flat = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) < 1e-9
    return ((rewards - mean) / (std + eps)).masked_fill(flat, 0.0)


def grpo_loss(logp, old_logp, ref_logp, advantage, grpo):
    """The GRPO objective of each token (arXiv 2402.03300, eq. 3 and 4) as a loss to minimise:
    -min(ratio A, clamp(ratio) A) + kl_weight k3, with k3 = exp(d) - d - 1, d = ref_logp - logp. The
    log-probs are (n,), A is one number. Returns three (n,): loss, k3, and 1.0 where the clipped
    term was smaller."""
    ratio = torch.exp(logp - old_logp)
    free = ratio * advantage
    clipped = ratio.clamp(1 - grpo.clip_ratio, 1 + grpo.clip_ratio) * advantage
    # k3 is never negative, and its mean over samples of the policy is KL(policy || reference):
    # J. Schulman, "Approximating KL divergence", 2020
    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return -torch.minimum(free, clipped) + grpo.kl_weight * k3, k3, (clipped < free).float()


def grpo_step(policy, reference, optimizer, questions, waves, seeds, grpo, listen=cut,
              reward=paper_reward):
    """Stage 2, one step: roll out, reward, compare within each group, update. questions: objects
    with .question, .choices and .answer; waves: their clips; seeds: one for each response, question
    by question; reward(rollout, question) -> {name: number}. Returns the Rollouts, their rewards by
    name, and the metrics of grpo_update."""
    questions = [q for q in questions for _ in range(grpo.group)]
    waves = [wave for wave in waves for _ in range(grpo.group)]
    responses = rollouts(policy, questions, waves, listen, grpo.temperature, seeds)
    parts = rewards_of(responses, questions, reward)
    rewards = torch.tensor([sum(part.values()) for part in parts], dtype=torch.float64)
    rewards = rewards.view(-1, grpo.group)
    for r, advantage in zip(responses, group_advantages(rewards).flatten().tolist()):
        r.advantage = advantage
    return responses, parts, grpo_update(policy, reference, optimizer, responses, grpo)


def grpo_update(policy, reference, optimizer, responses, grpo):
    """At most `grpo.mini_batches` updates, an optimizer_step on each consecutive share (of equal
    size, rounded up) of the responses, in passes of grpo.micro_batch. Loss: the mean over a
    response's sampled tokens, eos included, audio not; then over the share's responses on all
    processes, as in the paper. Responses whose advantage is 0, or without a token, are left out of
    the sum, not of that mean's count. Log-probs are of the sampled ids at grpo.temperature. Returns
    means by name: of the tokens trained on, loss, kl (k3), clip_share and logp_gap, |old log-prob -
    log-prob at sampling|; of all sampled tokens, entropy, -log p at sampling."""
    shares = batches(responses, math.ceil(len(responses) / grpo.mini_batches))
    kept = []
    for share in shares:
        # Without an advantage only its KL would count; the paper keeps it, which is 1.8x as slow.
        update = [r for r in share if r.advantage and r.logprobs]
        kept.append(sorted(update, key=lambda r: len(r.sample.ids)))  # by length: less padding
    # p_old is not decoding's, whose cached passes round differently, in bf16 too much for a ratio.
    # Later shares get it here, before any update; the first has it from its own pass, below.
    with torch.no_grad():
        for batch in batches(sum(kept[1:], []), grpo.micro_batch):
            for r, old_logp in zip(batch, policy([r.sample for r in batch], grpo.temperature)):
                r.old_logp = old_logp
    seen = {"loss": [], "kl": [], "clip_share": [], "logp_gap": []}
    for number, (share, update) in enumerate(zip(shares, kept)):
        n_responses = sum_over_processes(len(share))
        for batch in batches(update, grpo.micro_batch):
            samples = [r.sample for r in batch]
            with torch.no_grad():
                ref_logps = reference(samples, grpo.temperature)
            batch_loss = 0.0
            for r, logp, ref_logp in zip(batch, policy(samples, grpo.temperature), ref_logps):
                if number == 0:  # p is still p_old
                    r.old_logp = logp.detach()
                loss, k3, clipped = grpo_loss(logp, r.old_logp, ref_logp, r.advantage, grpo)
                batch_loss = batch_loss + loss.mean() / n_responses  # summed over processes
                gap = (r.old_logp - logp.new_tensor(r.logprobs)).abs()
                for values, x in zip(seen.values(), (loss, k3, clipped, gap)):
                    values += x.tolist()
            batch_loss.backward()
        optimizer_step(optimizer)  # it sums gradients over processes and clips them to norm 1
    seen["entropy"] = [-logp for r in responses for logp in r.logprobs]
    return means({name: (sum(values), len(values)) for name, values in seen.items()})


# ========================================================= The method ends here; plumbing follows.

torch.backends.cuda.enable_cudnn_sdp(False)  # bf16 gradients of NaN (torch 2.11)
warnings.filterwarnings("ignore", "`past_key_values` is deprecated")  # "cache" from 5.21 on
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class EchoError(Exception):
    """A mistake that the user can mend: what was wrong, where, and what to do, in one line."""


def refuse(where, wrong, advice=""):
    """Raise an error for the first of {what is wrong: does it hold?} that holds."""
    for what, holds in wrong.items():
        if holds:
            raise EchoError(f"{where}: {what}{advice}")


def find_choice(said, choices):
    """The one choice that a text means, or None: the same to the letter; else but for case and how
    many spaces; else also without quotes around it and punctuation behind it. The first comparison
    that fits any choice decides: None if it fits several. "5 dB" is not ".5 dB"."""
    def spelled(text):
        return " ".join(text.casefold().split())

    def bare(text):
        text = spelled(text).rstrip(".,;:!? ")
        return re.sub(r"^([\"'`])(.*)\1$", r"\2", text).rstrip(".,;:!? ").lstrip()

    for form in (str, spelled, bare):
        alike = {choice for choice in choices if form(choice) == form(said) != ""}
        if alike:
            return alike.pop() if len(alike) == 1 else None
    return None


def rewards_of(responses, questions, reward):
    """What a reward function gives each response, [{name: number}, ...], in the order of the names.
    It is checked here, since it may be anybody's: the same names for all, finite numbers."""
    parts = []
    for r, q in zip(responses, questions):
        part = reward(r, q)
        try:  # a copy, since it may return the same object each time
            parts.append({name: float(x) for name, x in sorted(part.items())})
            total = sum(parts[-1].values())
            good = parts[-1].keys() == parts[0].keys() != set() and abs(total) < 1e9
        except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
            good = False
        if not good:
            name = getattr(reward, "__name__", "of yours")
            raise EchoError(f"the reward {name} returned {str(part)[:150]}; needed: the same names "
                            "for every response, each with a finite number (below 1e9)")
    return parts


def batches(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


def optimizer_step(optimizer, max_norm=1.0):
    """One step, on the gradient summed over processes and clipped; none if the gradient is 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:  # without a gradient, too, so that any number of processes do the same
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if torch.distributed.is_initialized():
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


def means(sums):
    """{name: (sum, count)} of this process -> {name: mean over all processes}, without a name whose
    count is 0."""
    if torch.distributed.is_initialized():
        names = [None] * processes()[1]
        torch.distributed.all_gather_object(names, list(sums))
        if any(theirs != names[0] for theirs in names):
            raise EchoError(f"the processes have other names of rewards: {names[0]}, {names[-1]}")
    totals = {name: [*map(sum_over_processes, pair)] for name, pair in sums.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}


# ================================================================================ 7 audio encoders
class SmallEncoder(nn.Module):
    """(B, N) -> (B, n, dim), one token for every 40 ms begun, or for every half second of a
    thumbnail: log-mel, two strided convolutions (100 frames a second -> 25 tokens), and a recurrent
    network in both directions, which counts better than attention. A thumbnail averages mel POWER
    over half a second before that, so what changes within one can't be read from it.

    An encoder of your own needs `dim`, `pretrained` and forward(waves, thumbnail) like this one,
    and a line in make_encoder."""
    HOP = 160  # samples, 10 ms
    pretrained = False  # True: train_sft.py leaves its weights as they are

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
    """The encoder of a Whisper checkpoint, pooled to 25 tokens a second. Its windows are 30 s long,
    padding included: it was trained so, and attends to the padding. A thumbnail averages mel power
    as above, at the end together with padding."""
    pretrained = True

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
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def ran_out(error):
    """Is it about memory? For a CPU's, torch has no class of its own."""
    text = str(error)
    return isinstance(error, MemoryError) or bool(re.search("(of|enough|allocate) memory", text))


def read_decoder(name):
    """A Qwen2 or Qwen3 checkpoint, a name or a local folder -> decoder in fp32, tokenizer."""
    try:
        decoder, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attention_dropout=0.0, output_loading_info=True)
        # not AutoTokenizer: for Qwen2 it builds Qwen's own, even where another one was saved
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # each library has its own for a file that is missing or broken
        raise EchoError(f"{name}: no whole decoder there ({first_line(error)})") from None
    kind, table = decoder.config.model_type, decoder.get_input_embeddings()
    extra = [key for key in found["unexpected_keys"] if ".layers." in key]
    wrong = {f"a {kind} model; needed: Qwen2 or Qwen3": kind not in ("qwen2", "qwen3"),
             f"weights are missing: {sorted(found['missing_keys'])[:3]}": found["missing_keys"],
             f"weights that its config.json has no place for: {sorted(extra)[:3]}": extra,
             "its tokenizer has no eos token": tokenizer.eos_token_id is None,
             "a sliding window, which padding between tokens would fill": "sliding_attention" in (
                 getattr(decoder.config, "layer_types", None) or ()),
             f"more tokens than its {table.num_embeddings} embeddings":
                 len(tokenizer) > table.num_embeddings}
    refuse(name, wrong)
    return decoder, tokenizer


def make_encoder(name, folder=None):
    """The encoder of Config.encoder. folder: where its settings were saved, without weights; None:
    a new one, or the pretrained one of that name."""
    if name == "small":
        return SmallEncoder()
    wrong = []
    try:
        settings = transformers.WhisperConfig.from_pretrained(folder or name)
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder or name)
        if folder:  # a model for classification, since it has no decoder
            whisper = transformers.WhisperForAudioClassification(settings)
        else:
            whisper, found = transformers.WhisperModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True)
            wrong = [key for key in (*found["missing_keys"], *found["unexpected_keys"])
                     if "encoder." in key]
    except Exception as error:
        raise EchoError(f"{name}: no whole Whisper encoder there ({first_line(error)})") from None
    refuse(name, {
        "weights of its encoder are missing or have no place in its config.json": wrong,
        "its preprocessor_config.json is not of its config.json": (
            extractor.feature_size != settings.num_mel_bins
            or extractor.nb_max_frames != 2 * settings.max_source_positions)})
    return WhisperEncoder(whisper.encoder, extractor)


def save(model, folder):
    """Write a model's folder whole or not at all: decoder and tokenizer as transformers saves them,
    Whisper's settings in encoder/, all other weights in echo.pt, Config in echo.json."""
    folder = Path(folder).resolve()  # it may be a link
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
        for path in filter(Path.is_file, temporary.rglob("*")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # all of it is on the disk before it has its name
    except Exception as error:  # for a full disk each library has its own
        raise EchoError(f"{folder}: can't be written ({first_line(error)})") from None
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def has_model(folder):
    return (Path(folder) / "model" / "echo.json").is_file()


def model_folder(folder):
    """Where a model's files are: in the folder itself, or in its model/."""
    return Path(folder) / "model" if has_model(folder) else Path(folder)


def load(folder, device="cpu"):
    """The model that save() wrote to a folder, or to the folder's model/."""
    folder = model_folder(folder)
    if not (folder / "echo.json").is_file():
        raise EchoError(f"{folder}: no Echo checkpoint there (no echo.json); train one")
    try:
        config = Config(**json.loads((folder / "echo.json").read_text()))
        rest = torch.load(folder / "echo.pt", map_location="cpu", weights_only=True)
        encoder = make_encoder(config.encoder, folder / "encoder")
        model = Echo(config, encoder, *read_decoder(folder))
        missing = model.load_state_dict(rest, strict=False).missing_keys
        if any(not k.startswith("decoder.") for k in missing):
            raise EchoError(f"echo.pt lacks weights of {config.encoder!r}")
    except Exception as error:
        if ran_out(error):
            raise
        raise EchoError(f"{folder}: not a whole model, or of another version ({first_line(error)});"
                        " delete the folder and train or copy it again") from None
    return model.to(device)


# ========================================================================== 9 flags and processes
def parse_settings(cls, doc, defaults={}):
    """Flags for the fields of a dataclass: --a-b for a field a_b, --no-a-b for a bool. --help
    prints the dataclass itself, comments and all. defaults: instead of its own."""
    def fail(message):
        raise EchoError(f"{message} (--help lists the settings)")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for f in dataclasses.fields(cls):
        how = {"type": f.type, "default": f.default}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction, "default": f.default}
        elif f.type == list[str]:
            how = {"nargs": "*", "default": [], "action": "extend"}
        elif typing.get_args(f.type):  # of a Literal
            how = {"choices": typing.get_args(f.type), "default": f.default}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **how)
    classes = [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    parser.format_help = lambda: "\n".join([doc or "", *map(inspect.getsource, classes)])
    parser.error = fail
    parser.set_defaults(**defaults)
    values, rest = parser.parse_known_args()
    if rest:
        fail(f"unknown: {' '.join(rest)}")
    for f in dataclasses.fields(cls):
        value = getattr(values, f.name)
        least = int(type(f.default) is int and f.default > 0)  # what is 0 by default may be 0
        most = 2 ** 63 if f.name == "seed" else 10 ** 7
        if type(value) in (int, float) and not least <= value < most:
            fail(f"--{f.name.replace('_', '-')} {value}: needed: at least {least}, below {most}")
    return cls(**vars(values))


def main(run):
    """Run a script; a user's mistake ends it with one line and exit code 2."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # above: a closed one is None
        if hasattr(stream, "reconfigure"):  # a notebook's can't be
            stream.reconfigure(errors="backslashreplace")  # no letter ends a run
    try:
        sys.exit(run())
    except (EchoError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not ran_out(error):
            raise
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
    try:
        number = int(os.environ.get("LOCAL_RANK") or 0)
        world, rank = (int(os.environ.get(name) or 0) for name in ("WORLD_SIZE", "RANK"))
        if train and world and not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes")  # torch would wait for ever
        if torch.cuda.is_available():
            if number >= torch.cuda.device_count():
                raise EchoError(f"{torch.cuda.device_count()} GPUs; start as many processes at "
                                "most")
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        if train and world > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise EchoError(f"LOCAL_RANK, WORLD_SIZE or RANK: {first_line(error)}; use torchrun, "
                        "or unset them") from None
    return device


def processes():
    """This process's rank, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
