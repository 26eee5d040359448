"""Echo in one file: an audio language model that listens again while it reasons (arXiv 2602.11909).

The whole method, A being a clip and q a question about it:

    x = prompt(A, q)                               # the clip, heard once, and the question
    until the response o ends with eos:
        o += sample(policy(x + o))                 # one token of text
        if o closes <seg>s, e</seg>:
            o += enc(A[s:e])                       # hear that part of the ORIGINAL waveform again
    R     = format + consistency + accuracy + segment          # the four rewards of a response
    adv   = (R - mean R) / std R                               # within the group of one question
    ratio = p(o) / p_old(o)                                    # of each sampled token
    loss  = -min(ratio adv, clamp(ratio) adv) + kl_weight k3   # GRPO, arXiv 2402.03300; k3: the
                                                               # KL to the SFT policy, per token

Stage 1, SFT (train_sft.py), teaches to write tags, from text alone; stage 2, GRPO (train_rl.py),
teaches to gain from what they bring. Read from the top:

    1 settings   2 segment tags   3 text and audio in one sequence   4 audio encoder   5 the model
    6 interleaved decoding   7 the four rewards   8 GRPO            -- the method ends here --
    9 pretrained parts, save and load   10 audio files and rows of data   11 flags, runs, processes
"""
import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import transformers
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache,
                          PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor,
                          WhisperModel)

torch.backends.mha.set_fastpath_enabled(False)  # its eval-only kernel rounds otherwise: one path
torch.backends.cudnn.allow_tf32 = False         # so does a TF32 convolution, by the batch's size
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ======================================================================================= 1 settings

class EchoError(Exception):
    """A mistake that the user can mend: what was wrong, where, and what to do, in one line."""


@dataclass
class Config:
    """What a model is; saved with every checkpoint. The defaults are the toy's."""
    sample_rate: int = 16_000
    n_mels: int = 40
    window_length: int = 400        # samples, 25 ms
    hop_length: int = 160           # samples, 10 ms
    first_listen_rate: float = 2.0  # audio tokens a second; coarse, so that listening again finds
                                    # something new; 0: the full rate, as in the paper
    share_position: bool = True     # a re-listened segment takes one position, so that the text
                                    # around it stays close (the order of its tokens is in their
                                    # features); False: one a token, as in the paper
    min_segment_s: float = 0.2      # the one minimum, in training and in use, as in the paper
    max_segment_s: float = 30.0
    end_slack_s: float = 0.1        # an end this far past the clip is taken as the clip's end
    max_turns: int = 8              # segments heard in one response, as in the paper
    max_new_tokens: int = 100       # sampled tokens of a response
    encoder: str = "small"          # or a Whisper checkpoint: a name or a local folder
    encoder_dim: int = 96
    encoder_layers: int = 2
    encoder_heads: int = 4
    decoder: str = "tiny"           # or a Qwen2 checkpoint: a name or a local folder
    dim: int = 128
    layers: int = 4
    heads: int = 4
    prompt: str = "{question} Choose from {choices}."


# =================================================================================== 2 segment tags

@dataclass
class Segment:
    """What a pair of tags asked for, and what came of it. `reason` says why it was not heard."""
    text: str
    start_s: float | None = None
    end_s: float | None = None
    heard: bool = False
    reason: str | None = None


REASONS = ("malformed", "reversed", "outside the clip", "too short", "too long", "too many turns",
           "text reasoning", "no room left")
SECONDS = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*s?"            # 2   2.5   .5   2.5s   2.5 s
TIME = rf"(?:([0-9]+):(?=[0-5]?[0-9](?:[.\s,s]|$)))?{SECONDS}"  # also 1:02.5, minutes and seconds
SEGMENT = re.compile(rf"\s*{TIME}\s*,\s*{TIME}\s*")


def split_segments(text):
    """Take a text apart at its closed tags: [(text before <seg>, text inside), ...], the rest.
    Inside is None for a </seg> without a <seg> of its own."""
    *parts, rest = text.split("</seg>")
    pairs = []
    for part in parts:
        before, tag, inside = part.rpartition("<seg>")
        pairs.append((before, inside) if tag else (part, None))
    return pairs, rest


def parse_segment(inside, duration_s, turns=0, config=Config):
    """The text between <seg> and </seg> -> Segment, after `turns` heard ones; never raises. Its
    reason is None if it can be heard."""
    match = SEGMENT.fullmatch(inside or "")
    if not match:
        return Segment("</seg> without <seg>" if inside is None else inside, reason="malformed")
    start_min, start, end_min, end = (float(x or 0) for x in match.groups())
    start_s, end_s = 60 * start_min + start, 60 * end_min + end
    if start_s < duration_s < end_s <= duration_s + config.end_slack_s:
        end_s = duration_s
    length_s, tiny = end_s - start_s, 1e-6
    wrong = {"reversed": length_s < 0,
             "outside the clip": end_s > duration_s,
             "too short": length_s < config.min_segment_s - tiny,
             "too long": length_s > config.max_segment_s + tiny,
             "too many turns": turns >= config.max_turns}
    reasons = [reason for reason, holds in wrong.items() if holds]
    return Segment(inside, start_s, end_s, reason=reasons[0] if reasons else None)


# ================================================================= 3 text and audio in one sequence

AUDIO = -1  # stands in the ids where an audio token does; no id of any vocabulary


@dataclass
class Sample:
    """Text and audio as one sequence: the input of SFT, of a rollout and of its update."""
    ids: list = field(default_factory=list)       # token ids, AUDIO for each audio token
    trained: list = field(default_factory=list)   # is this id to be learned? never for AUDIO
    position: list = field(default_factory=list)  # position ids, not always 0, 1, 2, ...
    audio: list = field(default_factory=list)     # features (n, encoder dim) for AUDIO, in order

    def copy(self):
        return Sample(list(self.ids), list(self.trained), list(self.position), list(self.audio))

    def add(self, ids, trained=False, share_position=False):
        first = self.position[-1] + 1 if self.ids else 0
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.position += [first] * len(ids) if share_position else range(first, first + len(ids))
        return self

    def add_audio(self, features, share_position=False):
        """Append an audio token for each row of `features`; they may share one position."""
        self.audio.append(features)
        return self.add([AUDIO] * len(features), share_position=share_position)


# ================================================================================== 4 audio encoder
#
# For an encoder of your own: `TOKENS_PER_SECOND`, `dim`, and forward(waves: list of (N_i,),
# first_listen: bool) -> list of (n_i, dim), the same for a waveform alone and in a batch.

class SmallEncoder(nn.Module):
    """Log-mel, two strided convolutions (100 frames a second -> 25 tokens), transformer layers. The
    first listen is a thumbnail: mel POWER is averaged over 1 / first_listen_rate seconds before the
    encoder sees it, one token for each average. What changes within one can't be read from it."""
    TOKENS_PER_SECOND = 25

    def __init__(self, config):
        super().__init__()
        self.config, self.dim = config, config.encoder_dim
        self.mel = torchaudio.transforms.MelSpectrogram(
            config.sample_rate, config.window_length, config.window_length, config.hop_length,
            n_mels=config.n_mels, center=False)
        self.conv1 = nn.Conv1d(config.n_mels, self.dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(self.dim, self.dim, 3, stride=2, padding=1)
        layer = nn.TransformerEncoderLayer(
            self.dim, config.encoder_heads, 2 * self.dim, dropout=0.0, activation=F.gelu,
            batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.encoder_layers, nn.LayerNorm(self.dim),
                                            enable_nested_tensor=False)

    def log_mel(self, wave, first_listen):
        """(N,) samples -> (frames, n_mels); frame t is centred on the t-th hop."""
        hop, window = self.config.hop_length, self.config.window_length
        n_frames, before = math.ceil(wave.numel() / hop), (window - hop) // 2
        after = (n_frames - 1) * hop + window - before - wave.numel()
        mel = self.mel(F.pad(wave, (before, after)))                      # (n_mels, frames)
        if first_listen and self.config.first_listen_rate:
            frames = round(self.config.sample_rate / hop / self.config.first_listen_rate)
            mel = F.avg_pool1d(mel, frames, ceil_mode=True)
            mel = mel.repeat_interleave(4, 1)       # the convolutions make one token of 4 frames
        return (mel.clamp_min(1e-6).log10() + 2).T  # about centred on 0

    def forward(self, waves, first_listen):
        features = [self.log_mel(wave, first_listen) for wave in waves]
        lengths = torch.tensor([len(f) for f in features], device=features[0].device)
        x = pad_sequence(features, batch_first=True).transpose(1, 2)      # (B, n_mels, T)
        for conv in (self.conv1, self.conv2):
            x, lengths = F.gelu(conv(x)), (lengths + 1) // 2
            padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]  # (B, T)
            x = x.masked_fill(padding[:, None], 0.0)
        x = x.transpose(1, 2)                                             # (B, T, dim)
        x = x + sinusoids(x.shape[1], self.dim, x.device)
        x = self.layers(x, src_key_padding_mask=padding)
        return [row[:n] for row, n in zip(x, lengths.tolist())]


def sinusoids(length, dim, device):
    """(length, dim) sine and cosine positions."""
    rate = 10_000 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# ====================================================================================== 5 the model

class Echo(nn.Module):
    """Audio encoder, projector and a Qwen2 decoder. SFT and GRPO train the projector and the
    decoder (see set_trainable); the encoder is frozen."""
    LOGITS_AT_ONCE = 2 ** 24  # in the log-probs of trained tokens: 64 MB

    def __init__(self, config, encoder, decoder, tokenizer):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.tokenizer, self.bf16 = tokenizer, False
        self.piece = functools.cache(lambda token: tokenizer.decode([token]))  # a token's text
        self.projector = nn.Linear(encoder.dim, decoder.config.hidden_size)
        stop = getattr(decoder.generation_config, "eos_token_id", None) or []
        self.eos_ids = {tokenizer.eos_token_id, *([stop] if isinstance(stop, int) else stop)}

    @property
    def device(self):
        return self.projector.weight.device

    def autocast(self):
        """bf16 arithmetic where set_precision chose it; trained weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextlib.contextmanager
    def exact(self):
        """fp32 all the same: encoder and projector subtract large terms, bf16 loses the rest."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(precision)

    # ---------------------------------------------------------------- text and audio -> Sample

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def hear(self, waves, first_listen=False):
        """Waveforms (N_i,) -> features (n_i, encoder dim) in fp32; 32 at once, to bound memory."""
        features, waves = [], [w.to(self.device) for w in waves]
        self.encoder.eval()
        with self.exact():
            for at in range(0, len(waves), 32):
                features += self.encoder(waves[at:at + 32], first_listen)
        return features

    def prompt(self, features, question, choices=()):
        """What a response continues: the first listen, its times as text, and the question.

            [audio]0.0[audio]0.5[audio]1.0 ... How many pulses has the hum? Choose from ...

        features: the clip's first listen, or None for a question without a clip. At the full rate a
        time stands after the first token of each second.
        """
        sample, rate = Sample(), self.config.first_listen_rate or self.encoder.TOKENS_PER_SECOND
        every = 1 if self.config.first_listen_rate else self.encoder.TOKENS_PER_SECOND
        for i, token in enumerate(features if features is not None else ()):
            sample.add_audio(token[None])
            if i % every == 0:
                sample.add(self.ids(f"{i / rate:.1f}"))
        if choices:
            question = self.config.prompt.format(question=question, choices=", ".join(choices))
        return sample.add(self.ids(f" {question}\n"))

    def add_response(self, sample, text):
        """Append a whole response to learn, with eos."""
        return sample.add(self.ids(text) + [self.tokenizer.eos_token_id], trained=True)

    # ---------------------------------------------------------------- Samples -> log-probs

    def tensors(self, samples, since=None):
        """The ids of each sample from index `since` on, padded on the left, so that the last column
        is each row's newest: ids, position, mask (B, T), and audio features (n, encoder dim)."""
        new, position, audio = [], [], []
        for s, start in zip(samples, since or [0] * len(samples)):
            new.append(s.ids[start:])
            position.append(s.position[start:])
            if AUDIO in new[-1]:
                audio.append(torch.cat(s.audio)[-new[-1].count(AUDIO):])  # the newest features
        audio = torch.cat(audio).to(self.device) if audio else None
        mask = [[1] * len(ids) for ids in new]
        return *(pad_left(x, self.device) for x in (new, position, mask)), audio

    def embed(self, ids, audio):
        """(B, T) ids -> (B, T, D): token embeddings, the projected audio where ids are AUDIO."""
        x = self.decoder.get_input_embeddings()(ids.clamp_min(0)).float()
        if audio is not None:
            x = x.masked_scatter((ids == AUDIO)[..., None], self.projector(audio))
        return x

    def hidden(self, ids, position, mask, audio, cache=None):
        """(B, T, D) last hidden states; `mask` (B, cached + T) marks the real tokens."""
        with self.exact():
            x = self.embed(ids, audio)
        with self.autocast():
            return self.decoder.model(
                inputs_embeds=x, attention_mask=mask, position_ids=position,
                cache=cache, use_cache=cache is not None).last_hidden_state

    def forward(self, samples, temperature=1.0):
        """Log-probs of every trained token, flat in the order of the samples: (n,). The head sees
        the positions before trained tokens alone, a few at a time, and keeps nothing: the logits of
        a whole batch would be larger than a pretrained decoder. They are fp32: in bf16, logits of
        16 to 32 are 0.125 apart, too far for a ratio of probabilities."""
        ids, position, mask, audio = self.tensors(samples)
        hidden = self.hidden(ids, position, mask, audio)
        trained = pad_left([s.trained for s in samples], self.device)[:, 1:] > 0
        before = hidden[:, :-1][trained].float() / temperature            # t - 1 predicts t
        head, token = self.decoder.lm_head.weight.float(), ids[:, 1:][trained]

        def predict(before, token):
            return -F.cross_entropy(F.linear(before, head), token, reduction="none")
        size = max(1, self.LOGITS_AT_ONCE // len(head))
        return torch.cat([checkpoint(predict, *part, use_reentrant=False)
                          for part in zip(before.split(size), token.split(size))])

    @torch.no_grad()
    def log_probs(self, samples, temperature=1.0, tokens_per_batch=8192):
        """forward() without gradient and in micro-batches: a list of (n_i,), one a sample."""
        out = []
        for batch in micro_batches(samples, tokens_per_batch):
            n_trained = [sum(samples[i].trained) for i in batch]
            out += self([samples[i] for i in batch], temperature).split(n_trained)
        return out


def pad_left(rows, device):
    """Lists of numbers -> (B, T), the shorter ones with zeros on the left."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side="left").to(device)


def micro_batches(samples, budget):
    """Indices of the samples, in order, in batches of at most `budget` padded tokens or one row."""
    batches, longest = [], 0
    for i, sample in enumerate(samples):
        longest = max(longest, len(sample.ids))
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = len(sample.ids)
        batches[-1].append(i)
    return batches


# =========================================================================== 6 interleaved decoding

@dataclass
class Rollout:
    """A response while it is written, and its trace afterwards. Its ids before `cached` are in the
    KV cache; the newest never is."""
    sample: Sample              # the prompt, then sampled ids and inserted audio
    wave: torch.Tensor          # the original clip, (N,)
    draws: torch.Generator      # this row's own
    text: str = ""              # the sampled text, without eos
    logprobs: list = field(default_factory=list)  # of the sampled ids, at the rollout's temperature
    segments: list = field(default_factory=list)  # a Segment for each </seg>
    confidence: float = 0.0     # the policy's probability of the first answer token
    waiting: bool = False       # for the audio of its last segment
    ended: str | None = None    # "eos" or "length"
    n_prompt: int = 0           # length of the prompt in ids
    cached: int = 0
    computed: int = 0           # positions computed for it, padding included: a metric

    @property
    def heard(self):
        return [s for s in self.segments if s.heard]


class Cache(DynamicCache):
    """A KV cache in the dtype of the arithmetic: rotary embedding leaves the keys in fp32."""
    dtype = torch.float32

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.dtype), values.to(self.dtype), *args, **kwargs)


REASONING = ("interleaved", "text")
INSERTS = ("segment", "random", "silence")  # what is heard; the last two are controls


@torch.no_grad()
def rollouts(model, prompts, waves, group=1, reasoning="interleaved", temperature=1.0,
             max_new_tokens=None, insert="segment", seeds=None, max_rows=512, watch=None):
    """Decode `group` responses to each prompt: in training, evaluation and use. Returns Rollouts.
    prompts: Samples; waves: their clips, (N,). reasoning "text" hears nothing. temperature 0 is
    greedy. seeds: one a response, whose draws depend on it alone and not on its neighbours.
    max_rows: decoded at once. watch(rollout, Segment or None) is called after every token."""
    model.eval()
    n_tokens = max_new_tokens or model.config.max_new_tokens
    rows, room = [], model.decoder.config.max_position_embeddings - n_tokens
    for k, (prompt, wave) in enumerate(zip(prompts, waves)):
        if len(prompt.ids) > room:
            raise EchoError(f"a prompt of {len(prompt.ids)} tokens; the decoder's positions leave "
                            f"room for {room}: shorten question, clip or --max-new-tokens")
        for g in range(k * group, (k + 1) * group):
            draws = torch.Generator().manual_seed(int(seeds[g]) if seeds is not None else g)
            rows.append(Rollout(prompt.copy(), wave, draws, n_prompt=len(prompt.ids)))
    size = max(1, max_rows // group) * group
    with model.autocast():  # one context: trained weights are cast once, not at every token
        for at in range(0, len(rows), size):
            decode(model, rows[at:at + size], group, reasoning, temperature, n_tokens, insert,
                   watch)
    for row in rows:  # again from all ids: a letter beyond ASCII may have been cut between tokens
        ids = [i for i, new in zip(row.sample.ids, row.sample.trained) if new]
        row.text = model.tokenizer.decode([i for i in ids if i not in model.eos_ids])
    return rows


def decode(model, batch, group, reasoning, temperature, max_new_tokens, insert, watch):
    """Write the responses of a batch, all in one KV cache. A row that closes a segment waits. Once
    at least as many rows wait as run, all their segments are encoded together, appended and
    prefilled: one at a time, each would cost the batch a pass, and waiting for the last row would
    idle most. Idle rows get masked padding."""
    cache = Cache(config=model.decoder.config)
    cache.dtype = torch.bfloat16 if model.bf16 else torch.float32
    ids, position, mask, audio = model.tensors([row.sample for row in batch[::group]])
    hidden = model.hidden(ids, position, mask, audio, cache)[:, -1]
    cache.batch_repeat_interleave(group)                     # each prompt is computed once
    hidden, mask = hidden.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
    running, computed = batch, ids.shape[1]
    while True:
        for row in batch:
            row.computed += computed
        tokens, logprobs = sample_tokens(model, hidden, running, temperature)
        for row, token, logp in zip(running, tokens, logprobs):
            row.cached = len(row.sample.ids)
            segment = add_token(model, row, token, logp, reasoning, max_new_tokens)
            if watch:
                watch(row, segment)
        running = [row for row in batch if not row.waiting and not row.ended]
        waiting = [row for row in batch if row.waiting]
        if waiting and len(waiting) >= len(running):
            listen_again(model, waiting, insert)
            running = [row for row in batch if not row.ended]
        if not running:
            return
        batch, mask = shrink(cache, batch, mask)
        runs = [not row.waiting and not row.ended for row in batch]
        # not cached yet: the sampled id, and the audio of a row that listened; of idle rows nothing
        since = [row.cached if run else len(row.sample.ids) for row, run in zip(batch, runs)]
        ids, position, real, audio = model.tensors([row.sample for row in batch], since)
        mask, computed = torch.cat([mask, real], 1), ids.shape[1]
        hidden = model.hidden(ids, position, mask, audio, cache)[:, -1]
        hidden = hidden[torch.tensor(runs, device=hidden.device)]  # in the order of `running`


def sample_tokens(model, hidden, rows, temperature):
    """The next token of each row and its log-prob: two lists. hidden: (rows, D). Sampled by the
    inverse of the cumulated probabilities: one draw, where torch.multinomial takes one an id."""
    logits = model.decoder.lm_head(hidden / (temperature or 1.0))                    # (rows, V)
    logp = logits.float().log_softmax(-1)
    if temperature:
        total = logp.exp().cumsum(-1)
        draw = torch.cat([torch.rand(1, 1, generator=row.draws) for row in rows]).to(total)
        token = torch.searchsorted(total, draw * total[:, -1:], right=True)
        token = token.clamp_max(logp.shape[1] - 1)
    else:
        token = logp.argmax(-1, keepdim=True)
    return token[:, 0].tolist(), logp.gather(1, token)[:, 0].tolist()


def add_token(model, row, token, logp, reasoning, max_new_tokens):
    """Append a sampled id. Returns the Segment that its text closes, if it does."""
    row.sample.add([token], trained=True)
    row.logprobs.append(logp)
    if token in model.eos_ids:
        row.ended = "eos"
        return None
    answered = row.text.partition("<answer>")[2]
    row.text += model.piece(token)
    if not answered and row.text.partition("<answer>")[2]:  # the first token after <answer>
        row.confidence = math.exp(logp)
    if len(row.logprobs) >= max_new_tokens:
        row.ended = "length"
    pairs = split_segments(row.text)[0]
    if len(pairs) == len(row.segments):
        return None
    duration_s = len(row.wave) / model.config.sample_rate
    segment = parse_segment(pairs[-1][1], duration_s, len(row.heard), model.config)
    if not segment.reason and reasoning == "text":
        segment.reason = "text reasoning"
    if not segment.reason and row.ended:
        segment.reason = "no room left"
    row.waiting = segment.heard = not segment.reason
    row.segments.append(segment)
    return segment


def listen_again(model, rows, insert):
    """Append what each waiting row asked to hear: x' = x + o + enc(A[s:e]) of the paper."""
    pieces = []
    for row in rows:
        segment = row.segments[-1]
        piece = cut(row.wave, segment.start_s, segment.end_s, model.config.sample_rate)
        if insert == "random":
            last = len(row.wave) - len(piece)
            at = int(torch.randint(last + 1, (1,), generator=row.draws))
            piece = row.wave[at:at + len(piece)]
        pieces.append(torch.zeros_like(piece) if insert == "silence" else piece)
    for row, features in zip(rows, model.hear(pieces)):
        row.sample.add_audio(features, model.config.share_position)
        row.waiting = False


def cut(wave, start_s, end_s, sample_rate=Config.sample_rate):
    """A[s:e] of the paper: seconds `start_s` to `end_s` of a waveform (N,)."""
    return wave[round(start_s * sample_rate):round(end_s * sample_rate)]


def shrink(cache, batch, mask):
    """Drop ended rows and padding from the cache, once they are more than half of it. Columns may
    move: cached keys carry their rotary positions."""
    alive = torch.tensor([k for k, row in enumerate(batch) if not row.ended], device=mask.device)
    if 2 * mask[alive].sum() >= mask.numel():
        return batch, mask
    mask = mask[alive]
    order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()):]  # padding first, then out
    for layer in cache.layers:
        at = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        layer.keys, layer.values = (x[alive].gather(2, at) for x in (layer.keys, layer.values))
    return [batch[k] for k in alive.tolist()], mask.gather(1, order)


def ask(model, questions, waves, group=1, **decoding):
    """Rollouts of `group` responses to each Question about its clip; see rollouts()."""
    first_listens = model.hear(waves, first_listen=True)
    prompts = [model.prompt(f, q.question, q.choices) for f, q in zip(first_listens, questions)]
    return rollouts(model, prompts, waves, group, **decoding)


# =============================================================================== 7 the four rewards

def extract_answer(text):
    """What stands in the one <answer> block, or None. There is no fall-back."""
    blocks = re.findall("<answer>(.*?)</answer>", text, re.S)
    return blocks[0].strip() if len(blocks) == 1 else None


def same_answer(a, b):
    """Are two answers the same? Case, outer punctuation and spacing don't count."""
    a, b = (" ".join(s.casefold().split()).strip(" .,;:!?\"'") for s in (a, b))
    return a == b


def is_right(text, answer):
    extracted = extract_answer(text)
    return extracted is not None and same_answer(extracted, answer)


def format_reward(text):
    """0.5 for exactly one well-formed think block, then exactly one answer block."""
    match = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.S)
    return 0.5 if match and not re.search("</?(think|answer)>", match[1] + match[2]) else 0.0


def consistency_reward(text):
    """-0.1 for every </seg> followed by a capital or a tag (the paper), or by no word before the
    next tag (here); at least -0.5."""
    broken_off = 0
    for after in text.split("</seg>")[1:]:
        after = after.strip()
        if not re.match(r"[^<]*\w", after) or after[0].isupper():
            broken_off += 1
    return max(-0.5, -0.1 * broken_off)


def paper_reward(rollout, answer):
    """The four rewards of the paper, by name; their sum lies between -0.5 and 1.5."""
    right = is_right(rollout.text, answer)
    return {"format": format_reward(rollout.text),
            "consistency": consistency_reward(rollout.text),
            "accuracy": 0.5 * right,
            "segment": 0.5 * (right and bool(rollout.heard))}


def confidence_reward(rollout, answer):
    """The variant of the authors' script: accuracy by c, the policy's own confidence."""
    right, c = is_right(rollout.text, answer), rollout.confidence
    accuracy = 0.5 * (1 - (1 - c) ** 2) if right else -0.5 * c ** 2
    return paper_reward(rollout, answer) | {
        "accuracy": accuracy, "segment": accuracy * (right and bool(rollout.heard))}


REWARDS = {"paper": paper_reward, "confidence": confidence_reward}


# =========================================================================================== 8 GRPO

def group_advantages(rewards, eps=1e-4):
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group: (questions, G) -> (questions, G).
    A flat group, its rewards all equal, gets 0 and teaches nothing."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    return (rewards - mean) / (std + eps)


def grpo_loss(logp, old_logp, ref_logp, advantage, clip=0.2, kl_weight=0.04):
    """The GRPO objective of each token (arXiv 2402.03300, eq. 3 and 4) as a loss; all are (n,).
    The reference policy is the SFT policy, frozen.

        ratio = exp(logp - old_logp)
        loss  = -min(ratio advantage, clamp(ratio, 1 - clip, 1 + clip) advantage) + kl_weight k3
        k3    = exp(ref - logp) - (ref - logp) - 1      unbiased, never negative: KL(policy || ref)
    Returns loss, k3, and whether the clipped ratio was the smaller one.
    """
    ratio = torch.exp(logp - old_logp)
    free, bounded = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return -torch.minimum(free, bounded) + kl_weight * k3, k3, (bounded < free).float()


def grpo_update(training, policy, reference, responses, advantages, settings, lr):
    """`settings.mini_batches` updates on the responses of one step. advantages: (responses,).
    Old log-probs come from sampling. In bf16 cached decoding rounds otherwise than the pass that
    trains: they are computed again, or taken from that very pass if it is the only one. Returns
    means, 0 where there is no response."""
    policy.train()  # nothing drops out; gradient checkpointing works in this mode alone
    samples, budget = [r.sample for r in responses], settings.tokens_per_batch
    sampled = [torch.tensor(r.logprobs, device=policy.device) for r in responses]
    recompute = policy.bf16 and settings.mini_batches > 1
    old = policy.log_probs(samples, settings.temperature, budget) if recompute else sampled
    ref = reference.log_probs(samples, settings.temperature, budget)
    names, seen = ("loss", "kl", "clip_share", "entropy", "logp_gap"), torch.zeros(5)
    for mini_batch in torch.arange(len(responses)).tensor_split(settings.mini_batches):
        n_responses = training.sum(len(mini_batch))[0]
        for micro in micro_batches([samples[i] for i in mini_batch], budget):
            rows = mini_batch[micro]
            old_logp, ref_logp, sampled_logp = (torch.cat([x[i] for i in rows])
                                                for x in (old, ref, sampled))
            logp = policy([samples[i] for i in rows], settings.temperature)
            if policy.bf16 and not recompute:
                old_logp = logp.detach()
            n_tokens = torch.tensor([len(sampled[i]) for i in rows])
            advantage = advantages[rows].repeat_interleave(n_tokens).to(logp)
            weights = 1 / n_tokens / n_responses  # mean over a response's tokens, then responses
            weights = weights.repeat_interleave(n_tokens).to(logp)
            loss, k3, clipped = grpo_loss(logp, old_logp, ref_logp, advantage, settings.clip,
                                          settings.kl_weight)
            (weights * loss).sum().backward()
            gap = (logp - sampled_logp).abs()
            for k, x in enumerate((loss, k3, clipped, -sampled_logp, gap)):  # in order of `names`
                seen[k] += (weights * x.detach()).sum().cpu()
        if n_responses:
            training.update(lr)
    return dict(zip(names, (x / settings.mini_batches for x in training.sum(*seen))))


# ========================================================= The method ends here; plumbing follows.
# ================================================================ 9 pretrained parts, save and load

class WhisperEncoder(nn.Module):
    """The encoder of a Whisper checkpoint, pooled to 25 tokens a second. It works in windows of
    30 s, padded as it was trained, and the padding's tokens are cut away. A first listen with a
    rate of its own is the average of these tokens."""
    TOKENS_PER_SECOND = 25
    WINDOWS = 8  # encoded at once

    def __init__(self, config, whisper, extractor):
        super().__init__()
        self.config, self.whisper, self.extractor = config, whisper, extractor
        self.dim = whisper.config.d_model

    def encode(self, windows):
        """List of (N_i,), at most 30 s each -> (B, 750, dim)."""
        inputs = self.extractor([w.cpu().numpy() for w in windows], return_tensors="pt",
                                sampling_rate=self.config.sample_rate).input_features
        tokens = self.whisper(inputs.to(windows[0].device)).last_hidden_state   # (B, 1500, dim)
        return F.avg_pool1d(tokens.transpose(1, 2), 2).transpose(1, 2)          # 50 -> 25 a second

    def forward(self, waves, first_listen):
        windows = [w for wave in waves for w in wave.split(self.extractor.n_samples)]
        tokens = []
        for at in range(0, len(windows), self.WINDOWS):
            tokens += self.encode(windows[at:at + self.WINDOWS])
        out, at, config = [], 0, self.config
        for wave in waves:
            n = math.ceil(len(wave) / self.extractor.n_samples)
            n_tokens = -(-len(wave) * self.TOKENS_PER_SECOND // config.sample_rate)  # rounded up
            x = torch.cat(tokens[at:at + n])[:n_tokens]
            at += n
            if first_listen and config.first_listen_rate:
                every = self.TOKENS_PER_SECOND / config.first_listen_rate  # 12.5 overlap by one
                x = torch.stack([x[int(i * every):math.ceil((i + 1) * every)].mean(0)
                                 for i in range(math.ceil(len(x) / every))])
            out.append(x)
        return out


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def pretrained(load, name):
    """load(name), with one line for a name that is neither a folder nor reachable."""
    try:
        return load(name)
    except Exception as error:  # safetensors has its own
        if Path(name).is_dir():
            raise EchoError(f"{name}: not a checkpoint of the kind needed here "
                            f"({first_line(error)})") from None
        raise EchoError(
            f"{name}: neither a folder here nor reachable; where there is a network, run: "
            f"hf download {name} --local-dir {Path(name).name}, and give that folder "
            f"({first_line(error)})") from None


def build(config, decoder=None, tokenizer=None):
    """A new model. Tiny parts are handed in (train_sft.py makes them), others loaded by name."""
    if decoder is None:
        tokenizer = pretrained(AutoTokenizer.from_pretrained, config.decoder)
        decoder = pretrained(lambda name: AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32), config.decoder)
        if decoder.config.model_type != "qwen2":
            raise EchoError(f"--decoder {config.decoder}: a {decoder.config.model_type} model; "
                            "needed: a Qwen2 checkpoint")
    if config.encoder == "small":
        return Echo(config, SmallEncoder(config), decoder, tokenizer)
    whisper = pretrained(lambda name: WhisperModel.from_pretrained(name, dtype=torch.float32),
                         config.encoder)
    extractor = pretrained(WhisperFeatureExtractor.from_pretrained, config.encoder)
    return Echo(config, WhisperEncoder(config, whisper.encoder, extractor), decoder, tokenizer)


def set_trainable(model, what):
    """Train the projector and what --train names; embeddings and head only of a tiny decoder, the
    audio encoder never."""
    layers = model.decoder.model.layers
    n = int(what[5:]) if re.fullmatch("last-[0-9]+", what) else 0
    if what not in ("decoder", "projector", "none") and not 0 < n <= len(layers):
        raise EchoError(f"--train {what}: must be decoder, projector, or last-N with N up to "
                        f"{len(layers)}")
    model.requires_grad_(False)
    model.projector.requires_grad_(what != "none")
    parts = [*layers[len(layers) - n:], model.decoder.model.norm] if n else []
    if what == "decoder":
        parts = [model.decoder if model.config.decoder == "tiny" else model.decoder.model]
    for part in parts:
        part.requires_grad_(True)
    if model.config.decoder != "tiny":
        model.decoder.get_input_embeddings().requires_grad_(False)


DTYPES = ("auto", "fp32", "bf16")


def set_precision(model, dtype="auto"):
    """bf16 arithmetic, or fp32. auto: bf16 for a pretrained decoder where the hardware has it.
    Weights that are trained stay fp32 (an update of lr 1e-6 would vanish in bf16), frozen matrices
    are kept in bf16, which is what autocast rounds them to; norms and rotary angles stay fp32. What
    stays an fp32 product, the head's, rounds its factors (to bf16, TF32 on CUDA), not its sum."""
    hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if model.device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported()
    pretrained = model.config.decoder != "tiny"
    model.bf16 = dtype == "bf16" or dtype == "auto" and pretrained and hardware
    torch.set_float32_matmul_precision("medium" if model.bf16 else "highest")
    if model.bf16:
        table = model.decoder.get_input_embeddings().weight
        for module in model.decoder.modules():
            matrix = isinstance(module, (nn.Linear, nn.Embedding))
            if not matrix or module.weight.requires_grad:
                continue
            if pretrained or module.weight is not table:  # which a tiny decoder's policy trains
                module.to(torch.bfloat16)
    return model


def prepare(model, settings):
    """Ready for training: what --train names, in --dtype, with or without --checkpointing."""
    set_trainable(model, settings.train)
    set_precision(model, settings.dtype)
    if settings.checkpointing:
        model.decoder.activation_checkpointing_enable()
    return model.train()


def write_atomically(path, data):
    """Write bytes or text whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_folder(folder, fill):
    """Fill a new folder under a temporary name, then put it in the place of `folder`."""
    folder = Path(folder)
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
    except Exception as error:  # torch and safetensors have their own for a full disk
        free = shutil.disk_usage(temporary).free / 1e9
        shutil.rmtree(temporary)
        raise EchoError(f"{folder}: can't be written, {free:.1f} GB are free "
                        f"({first_line(error)})") from None
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save(model, folder):
    """Decoder and tokenizer as transformers saves them, the rest as echo.safetensors, echo.json."""
    described = {"config": dataclasses.asdict(model.config)}
    if isinstance(model.encoder, WhisperEncoder):
        described["whisper"] = model.encoder.whisper.config.to_dict()
        described["extractor"] = model.encoder.extractor.to_dict()
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}

    def fill(temporary):
        model.decoder.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        save_file(rest, temporary / "echo.safetensors")
        (temporary / "echo.json").write_text(json.dumps(described, indent=2))
    write_folder(folder, fill)


def load(folder, device="cpu"):
    """The model that save() wrote to a folder, or to the folder's model/; in eval mode."""
    folder = Path(folder)
    folder = folder if (folder / "echo.json").is_file() else folder / "model"
    if not (folder / "echo.json").is_file():
        raise EchoError(f"{folder.parent}: no Echo checkpoint there (no echo.json); train one, or "
                        "give another folder")
    try:
        described = json.loads((folder / "echo.json").read_text())
        config = Config(**described["config"])
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # Auto... picks by config.json
        encoder = SmallEncoder(config)
        if "whisper" in described:
            whisper = WhisperModel(WhisperConfig(**described["whisper"])).encoder
            extractor = WhisperFeatureExtractor(**described["extractor"])
            encoder = WhisperEncoder(config, whisper, extractor)
        model = Echo(config, encoder, decoder, tokenizer)
        rest = load_file(folder / "echo.safetensors")
        keys = model.load_state_dict(rest, strict=False)
        lost = [k for k in keys.missing_keys if not k.startswith("decoder.")] + keys.unexpected_keys
        if lost:
            raise ValueError(f"{lost[0]} does not fit")
    except Exception as error:
        raise EchoError(f"{folder}: broken checkpoint, {first_line(error)}") from None
    return model.to(device).eval()


# ================================================================== 10 audio files and rows of data

def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise EchoError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise EchoError(f"{str(path)[:200]}: can't be read ({type(error).__name__})") from None


def read_wav(path, data):
    """A WAV file's bytes, 8 to 32-bit integer or float PCM -> (N, channels) float32, rate in Hz."""
    chunks, at = {}, 12
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at:at + 8])
        chunks.setdefault(name, data[at + 8:at + 8 + size])
        if name == b"data" and len(data) - at - 8 < size < 0x7FFF_0000:  # streams leave it open
            raise EchoError(f"{path}: broken WAV, {len(data) - at - 8} of {size} bytes of audio "
                            "are there; export it again")
        at += 8 + size + size % 2
    header, audio = chunks.get(b"fmt ", b""), chunks.get(b"data")
    if len(header) < 16 or audio is None:
        raise EchoError(f"{path}: broken WAV, no 'fmt ' or no 'data' chunk; export it again")
    coding, channels, rate, _, _, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == 0xFFFE and len(header) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the coding follows
        coding = struct.unpack("<H", header[24:26])[0]
    if (coding, bits) not in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32)) or not channels:
        raise EchoError(f"{path}: WAV coding {coding} with {bits} bits; needed: 8, 16, 24, 32-bit "
                        "integer or 32-bit float PCM")
    if not 1000 <= rate <= 768_000:
        raise EchoError(f"{path}: a sample rate of {rate} Hz; needed: 1 to 768 kHz")
    width = bits // 8
    raw = np.frombuffer(audio[:len(audio) // (channels * width) * channels * width], np.uint8)
    if coding == 3:
        return raw.view("<f4").reshape(-1, channels), rate
    left_aligned = np.zeros((len(raw) // width, 4), np.uint8)  # in 32 bits
    left_aligned[:, 4 - width:] = raw.reshape(-1, width) ^ (128 if bits == 8 else 0)
    wave = left_aligned.view("<i4").astype(np.float32) / 2 ** 31
    return wave.reshape(-1, channels), rate


def load_audio(path, sample_rate=Config.sample_rate):
    """A clip as a mono waveform, (N,) float32 at `sample_rate`; formats but WAV need torchcodec."""
    data = read_bytes(path)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        wave, rate = read_wav(path, data)
    else:
        try:
            wave, rate = torchaudio.load(path)
            wave = wave.T.numpy()
        except Exception:
            raise EchoError(
                f"{path}: not a WAV file; convert it first (ffmpeg -i {Path(path).name} "
                f"{Path(path).stem}.wav), or pip install torchcodec, which reads more") from None
    if not wave.size:
        raise EchoError(f"{path}: the clip is empty, it holds no samples")
    if not np.abs(wave).max() <= 1e4:
        raise EchoError(f"{path}: samples are NaN or beyond 10,000; export it again")
    if rate // math.gcd(rate, sample_rate) > 12_000:  # the filter would take gigabytes
        raise EchoError(f"{path}: a sample rate of {rate} Hz; convert it to {sample_rate} first")
    mono = torch.from_numpy(wave.mean(1, dtype=np.float32))
    return torchaudio.functional.resample(mono, rate, sample_rate)


def read_rows(path, needs=()):
    """Rows of a JSON list or of JSON lines, each a dict with text under the keys `needs`."""
    number = 0
    try:
        text, rows = read_bytes(path).decode("utf-8-sig"), []
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise EchoError(f"{path}, byte {error.start}: not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"row {number}" if number else f"line {error.lineno}"
        raise EchoError(f"{path}, {where}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise EchoError(f"{path}: no rows of data ({type(error).__name__})") from None
    if not rows:
        raise EchoError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        for key in needs:
            if not isinstance(row, dict) or not row.get(key) or not isinstance(row[key], str):
                raise EchoError(f"{path}, row {number}: no text under {key!r}; needed: "
                                f"{', '.join(needs)}")
    return rows


@dataclass
class Question:
    """A row as published: the native one, MMAR's (choices) or MMAU's (audio_id, choices)."""
    row: dict
    path: Path
    question: str
    choices: list
    answer: str | None
    category: str


def read_questions(path, audio_root="", needs=("answer",)):
    """Questions of a data file. Audio paths are relative to `audio_root`, or the file's folder."""
    questions = []
    for number, row in enumerate(read_rows(path, ("question", *needs)), 1):
        answer, audio = row.get("answer"), row.get("audio_path") or row.get("audio_id")
        choices, wrong = row.get("multi_choice") or row.get("choices"), None
        if not isinstance(audio, str):
            wrong = "no 'audio_path' (or 'audio_id')"
        elif not choices or not isinstance(choices, list) or \
                not all(isinstance(c, str) for c in choices):
            wrong = "no 'multi_choice' (or 'choices'), a list of texts"
        elif not isinstance(answer, str | None):
            wrong = f"'answer' is not a text: {answer!r}"
        elif needs and not any(same_answer(answer, c) for c in choices):
            wrong = f"the answer {answer!r} is not among the choices"
        if wrong:
            raise EchoError(f"{path}, row {number}: {wrong}")
        category = row.get("category") or row.get("task") or "all"
        category = ", ".join(map(str, category if isinstance(category, list) else [category]))
        questions.append(Question(row, Path(audio_root or Path(path).parent) / audio,
                                  row["question"], choices, answer, category))
    return questions


# ======================================================================== 11 flags, runs, processes

def parse_settings(cls, doc):
    """Flags for the fields of a dataclass: --a-b for a field a_b, also --no-a-b if it is a bool;
    those in cls.POSITIONAL stand bare. --help prints the dataclass itself, comments and all."""
    def fail(message):
        raise EchoError(f"{message} (--help lists the settings)")
    parser = argparse.ArgumentParser(
        description=f"{doc}\n{inspect.getsource(cls)}", usage="%(prog)s [--setting value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, hidden = fail, argparse.SUPPRESS
    for f in dataclasses.fields(cls):
        flags = {"--" + f.name.replace("_", "-"), "--" + f.name}
        how = {"type": type(f.default)}
        if f.name in getattr(cls, "POSITIONAL", ()):
            flags, how = {f.name}, {"nargs": "?"}
        elif isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            how = {"nargs": "+"}
        parser.add_argument(*sorted(flags), default=hidden, help=hidden, **how)
    given = vars(parser.parse_args())
    settings = cls(**given)
    settings.given = set(given)
    for f in dataclasses.fields(cls):  # a count that is 0 by default may be 0; none is negative
        value, least = getattr(settings, f.name), int(type(f.default) is int and f.default > 0)
        if isinstance(value, (int, float)) and not value >= least:
            fail(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    return settings


def follow_decoder(settings, decoder):
    """With a pretrained decoder, settings that were not given are those of PRETRAINED; tell."""
    if decoder == "tiny":
        return
    for name, value in settings.PRETRAINED.items():
        if name not in settings.given:
            setattr(settings, name, value)
    if processes()[0] == 0:
        print("for a pretrained decoder: " + ", ".join(
            f"{name} {getattr(settings, name)}" for name in settings.PRETRAINED))


def require(settings, **known):
    """A one-line error for a setting that is none of the known values."""
    for name, values in known.items():
        if getattr(settings, name) not in values:
            raise EchoError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be one of "
                            f"{', '.join(values)}")


def main(run):
    """Run a script; a user's mistake ends it with one line and exit code 2."""
    try:
        sys.exit(run())
    except (EchoError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def pick_device(name="auto"):
    """The device of this process; under torchrun the processes find each other here."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise EchoError(f"--device {name}: {first_line(error)}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def processes():
    """This process's rank, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def barrier():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def linear_schedule(step, steps, warmup=0, final=0.0):
    """Factor on the learning rate: linear warm-up, then linear to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * max(0.0, (steps - step) / max(1, steps - warmup))


FREE = ("out", "device", "save_every", "log_every", "tokens_per_batch", "checkpointing", "retrain",
        "stage", "max_rows")  # settings that may change while a run goes on


def already_trained(folder, settings):
    """Is the run in this folder finished? One that was begun with other settings is an error;
    settings.retrain removes it. `settings` is the dict of those that the run depends on."""
    begun, *results = (Path(folder) / name for name in ("settings.json", "saves", "model"))
    if settings["retrain"] and processes()[0] == 0:
        for result in results:
            shutil.rmtree(result, ignore_errors=True)
    barrier()
    before = {}
    if begun.is_file() and any(result.exists() for result in results):
        before = json.loads(begun.read_text())
    for k, v in settings.items():
        if k not in FREE and before.get(k, v) != v:
            raise EchoError(f"{folder} was begun with {k} = {before[k]}, now it is {v}; give the "
                            "same value, another --out, or --retrain")
    done = (results[-1] / "echo.json").is_file()
    if done and processes()[0] == 0:
        print(f"{folder}: already trained (--retrain trains it again)")
    return done


class Training:
    """Optimiser, log and saves of one training, which may be killed at any moment and run again.
    All randomness of a training is drawn from (seed, step): step, trained weights and optimiser are
    all there is to save. `rates`: factors on the learning rate of parts of the module."""
    def __init__(self, folder, module, settings, rates={}):
        self.folder, self.step, self.log_bytes = Path(folder), 0, 0
        self.rank, self.world = processes()
        self.trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.device = next(iter(self.trained.values())).device
        groups = [{"params": [p], "rate": rates.get(k.split(".")[0], 1.0)}
                  for k, p in self.trained.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        if self.saves():
            self.resume(self.saves()[-1] / "training.pt")
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "settings.json", json.dumps(settings, indent=2))
            with open(self.folder / "log.jsonl", "ab") as log:  # what came after the last save
                log.truncate(min(self.log_bytes, log.tell()))   # happens again

    def saves(self):
        found = (self.folder / "saves").glob("step-*")
        return sorted(p for p in found if p.suffix not in (".tmp", ".old"))

    @torch.no_grad()
    def resume(self, file):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for k, p in self.trained.items():
            p.copy_(saved["trained"][k])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.log_bytes = saved["step"], saved["log_bytes"]

    def save(self):
        """Save everything, atomically; keep the last two saves."""
        if self.rank == 0:
            saved = {"trained": {k: p.detach() for k, p in self.trained.items()},
                     "optimizer": self.optimizer.state_dict(), "step": self.step,
                     "log_bytes": self.log_bytes}
            write_folder(self.folder / "saves" / f"step-{self.step:06d}",
                         lambda temporary: torch.save(saved, temporary / "training.pt"))
            for old in self.saves()[:-2]:
                shutil.rmtree(old)
        barrier()

    def finish(self, model):
        """Save the trained model; the saves on the way are no longer needed."""
        if self.rank == 0:
            save(model, self.folder / "model")
            shutil.rmtree(self.folder / "saves", ignore_errors=True)
        barrier()

    def steps(self, n, desc, save_every):
        """The steps that are still to do, behind a progress bar; every few of them, a save."""
        for step in tqdm(range(self.step, n), desc=desc, initial=self.step, total=n,
                         disable=self.rank > 0):
            yield step
            if self.step % save_every == 0:
                self.save()

    def log(self, show=(), **metrics):
        """A JSON line with everything, and the metrics in `show` as a line for people; rank 0."""
        if self.rank:
            return
        entry = {"step": self.step}
        for k, v in metrics.items():
            entry[k] = float(f"{v:.7g}")
        said = [f"{k} {entry[k]:.3g}" for k in show]
        tqdm.write(f"step {self.step}  " + "  ".join(said))
        with open(self.folder / "log.jsonl", "ab") as log:
            log.write((json.dumps(entry) + "\n").encode())
            self.log_bytes = log.tell()

    def batch(self, n, size, seed):
        """This process's share of a step's batch: indices into n rows, each once an epoch, in an
        order drawn from `seed`."""
        if size < self.world:
            raise EchoError(f"{self.world} processes for a batch of {size}; start fewer")
        at = np.arange(self.step * size, (self.step + 1) * size)
        order = {e: np.random.default_rng([seed, e]).permutation(n) for e in set(at // n)}
        return [int(order[k // n][k % n]) for k in at][self.rank::self.world]

    def sum(self, *values):
        """The sum of each value over all processes."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            torch.distributed.all_reduce(total)
        return total.tolist()

    def mean(self, metrics):
        """The mean of a dict of metrics over all processes, whose shares are equal."""
        return {k: v / self.world for k, v in zip(metrics, self.sum(*metrics.values()))}

    def update(self, lr, clip_norm=1.0):
        """One step of the optimiser, on the gradient summed over processes and clipped."""
        if self.world > 1:
            for p in self.trained.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
        if not nn.utils.clip_grad_norm_(self.trained.values(), clip_norm).isfinite():
            raise EchoError(f"{self.folder}, step {self.step}: the gradient is not finite; start "
                            "again with a lower learning rate in another --out")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
