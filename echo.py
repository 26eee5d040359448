"""Echo in one file: an audio language model that listens again while it reasons (arXiv 2602.11909).

The model hears a clip once, as a coarse first listen, and reasons in text. Whenever it has written
    <seg>s, e</seg>
decoding pauses, seconds s to e are cut from the ORIGINAL waveform, encoded at the full rate, appended to
the context, and decoding goes on. SFT teaches it to point at segments; GRPO teaches it to gain from them.

Read from top to bottom:
    1 settings   2 audio   3 audio encoder   4 the model   5 segment tags   6 interleaved decoding
    7 rewards and GRPO   8 checkpoints   9 rows of data   10 a training run
The scripts make_data.py, train_sft.py, train_rl.py and generate.py hold only their loops.
"""
import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import struct
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel)

torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's eval-only kernel rounds otherwise: one path
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ============================================================================================== 1 settings

AUDIO = "<|audio|>"  # placeholder id: one per audio token, its embedding comes from the encoder
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<seg>", "</seg>")
PAPER_PROMPT = ("{question} Choose the answer from {choices}. Think step-by-step. Refer to the specific audio segments "
                "while thinking, and indicate the corresponding timestamps. Answer in the format of "
                "<think>...</think><answer>...</answer>.")


class EchoError(Exception):
    """A mistake that the user can mend. Says what was wrong, where, and what to do, in one line."""


@dataclass
class Config:
    """What a model is; saved with every checkpoint. The defaults are the toy's."""
    sample_rate: int = 16_000
    n_mels: int = 40
    window_length: int = 400                # samples, 25 ms
    hop_length: int = 160                   # samples, 10 ms
    first_listen_rate: float | None = 2.0   # audio tokens a second in the first listen; None: the full rate (the paper)
    share_position: bool = True             # all tokens of a re-listened segment at one position; False: one each
    min_segment_s: float = 0.2              # shorter segments are not heard; the one minimum, in training and in use
    max_turns: int = 8                      # segments heard in one response
    encoder: str = "small"                  # or a Whisper checkpoint: a name or a local folder
    encoder_dim: int = 96
    encoder_layers: int = 2
    encoder_heads: int = 4
    decoder: str = "tiny"                   # or a Qwen2 checkpoint: a name or a local folder
    dim: int = 128
    layers: int = 4
    heads: int = 8
    prompt: str = "{question} Choose from {choices}."  # the toy's, short; a pretrained decoder gets PAPER_PROMPT


def parse_settings(cls, doc, argv=None):
    """Command-line flags for the fields of a settings dataclass; the comment beside a field is its help.

    A field `a_b` is set by --a-b or --a_b; a bool by --a-b and --no-a-b; fields named in `cls.POSITIONAL` stand bare.
    """
    def fail(message):
        raise EchoError(f"{message} (--help lists the settings)")
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    for f in dataclasses.fields(cls):
        flag, help = "--" + f.name.replace("_", "-"), comments.get(f.name, "").replace("%", "%%")
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        if f.name in getattr(cls, "POSITIONAL", ()):
            parser.add_argument(f.name, nargs="?", default=default, help=help)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            convert = lambda text, kind=kind, f=f: None if "None" in str(f.type) and text.lower() == "none" else kind(text)
            convert.__name__ = kind.__name__  # what argparse calls it in an error
            parser.add_argument(*dict.fromkeys((flag, "--" + f.name)), type=convert, default=default, metavar=kind.__name__,
                                nargs="+" if "list" in str(f.type) else None, help=f"{help} (default {default})")
    return cls(**vars(parser.parse_args(argv)))


def main(run):
    """Run a script; a user's mistake ends it with one line and exit code 2."""
    try:
        sys.exit(run())
    except EchoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ============================================================================================== 2 audio

def read_wav(path):
    """Read a WAV file: 8, 16, 24, 32-bit integer or 32-bit float PCM. Returns (channels, N) float32 in [-1, 1], rate."""
    path = Path(path)
    if not path.is_file():
        raise EchoError(f"{path}: no such file")
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise EchoError(f"{path}: not a WAV file; convert it first: ffmpeg -i {path.name} -ac 1 -ar 16000 {path.stem}.wav")
    chunks, at = {}, 12
    while at + 8 <= len(data):
        name, size = data[at:at + 4], struct.unpack("<I", data[at + 4:at + 8])[0]
        chunks.setdefault(name, data[at + 8:at + 8 + size])
        if name == b"data" and size > len(chunks[name]) and size < 0xFFFF_FF00:  # streams leave the size open
            raise EchoError(f"{path}: broken WAV, {len(chunks[name])} of {size} bytes of audio are there; export it again")
        at += 8 + size + size % 2
    if len(chunks.get(b"fmt ", b"")) < 16 or b"data" not in chunks:
        raise EchoError(f"{path}: broken WAV, its 'fmt ' or 'data' chunk is missing; export it again")
    coding, channels, rate, _, block, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
    if coding == 0xFFFE and len(chunks[b"fmt "]) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the coding follows
        coding = struct.unpack("<H", chunks[b"fmt "][24:26])[0]
    if (coding, bits) not in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32)) or not channels or not rate:
        raise EchoError(f"{path}: WAV coding {coding} with {bits} bits; needed: 8, 16, 24, 32-bit integer or 32-bit float PCM")
    raw = chunks[b"data"][:len(chunks[b"data"]) // (channels * bits // 8) * (channels * bits // 8)]
    if not raw:
        raise EchoError(f"{path}: the clip is empty, it holds no samples")
    if coding == 3:
        wave = np.frombuffer(raw, "<f4")
    elif bits == 8:
        wave = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif bits == 24:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wave = padded.view("<i4")[:, 0].astype(np.float32) / 2 ** 31
    else:
        wave = np.frombuffer(raw, f"<i{bits // 8}").astype(np.float32) / 2 ** (bits - 1)
    if not np.isfinite(wave).all():
        raise EchoError(f"{path}: the samples hold NaN or infinity; export it again")
    return torch.from_numpy(wave.reshape(-1, channels).T.copy()), rate


def load_audio(path, sample_rate=Config.sample_rate):
    """A WAV file as a mono waveform: (N,) float32 at `sample_rate`."""
    wave, rate = read_wav(path)
    return torchaudio.functional.resample(wave.mean(0), rate, sample_rate)


def wav_bytes(wave, sample_rate):
    """(N,) float samples in [-1, 1] as the bytes of a 16-bit mono WAV file."""
    raw = (np.asarray(wave) * 32767).round().astype("<i2").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(raw), b"WAVE", b"fmt ", 16, 1, 1, sample_rate,
                         2 * sample_rate, 2, 16, b"data", len(raw))
    return header + raw


def cut(wave, start_s, end_s, sample_rate=Config.sample_rate):
    """A[s:e] of the paper: seconds `start_s` to `end_s` of a waveform (N,)."""
    return wave[round(start_s * sample_rate):round(end_s * sample_rate)]


# ============================================================================================== 3 audio encoder
#
# The interface, for an encoder of your own: `dim`; `n_tokens(n_samples, first_listen)`; and
# forward(waves: list of (N_i,), first_listen: bool) -> list of (n_i, dim), one by one the same as in a batch.

class SmallEncoder(nn.Module):
    """Log-mel, two strided convolutions (100 frames a second -> 25 tokens) and a few transformer layers.

    The first listen is a thumbnail: the mel POWER is averaged over 1 / first_listen_rate seconds before the encoder
    sees it, one token for each average, so that what changes within one average is not there to be read.
    """
    TOKENS_PER_SECOND = 25

    def __init__(self, config):
        super().__init__()
        self.config, self.dim = config, config.encoder_dim
        self.mel = torchaudio.transforms.MelSpectrogram(config.sample_rate, config.window_length, config.window_length,
                                                        config.hop_length, n_mels=config.n_mels, center=False)
        self.conv1 = nn.Conv1d(config.n_mels, self.dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(self.dim, self.dim, 3, stride=2, padding=1)
        layer = nn.TransformerEncoderLayer(self.dim, config.encoder_heads, 2 * self.dim, dropout=0.0, activation=F.gelu,
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.encoder_layers, nn.LayerNorm(self.dim), enable_nested_tensor=False)

    def power(self, wave):
        """(N,) samples -> (n_mels, ceil(N / hop_length)) mel power; frame t is centred on the t-th hop."""
        hop, window = self.config.hop_length, self.config.window_length
        n_frames, before = math.ceil(wave.numel() / hop), (window - hop) // 2
        return self.mel(F.pad(wave, (before, (n_frames - 1) * hop + window - before - wave.numel())))

    def n_tokens(self, n_samples, first_listen):
        frames = math.ceil(n_samples / self.config.hop_length)
        if first_listen and self.config.first_listen_rate:
            return math.ceil(frames / self.frames_per_thumbnail)
        return math.ceil(frames / 4)

    @property
    def frames_per_thumbnail(self):
        return round(self.config.sample_rate / self.config.hop_length / self.config.first_listen_rate)

    def forward(self, waves, first_listen):
        features = []
        for wave in waves:
            mel = self.power(wave)                                                       # (n_mels, frames)
            if first_listen and self.config.first_listen_rate:
                mel = F.avg_pool1d(mel, self.frames_per_thumbnail, ceil_mode=True).repeat_interleave(4, 1)
            features.append((mel.clamp_min(1e-6).log10() + 2).T)                         # (frames, n_mels)
        lengths = torch.tensor([len(f) for f in features], device=features[0].device)
        x = nn.utils.rnn.pad_sequence(features, batch_first=True).transpose(1, 2)        # (B, n_mels, T)
        for conv in (self.conv1, self.conv2):
            x, lengths = F.gelu(conv(x)), (lengths + 1) // 2
            padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]      # (B, T)
            x = x.masked_fill(padding[:, None], 0.0)
        x = x.transpose(1, 2)                                                            # (B, T, dim)
        x = self.layers(x + sinusoids(x.shape[1], self.dim, x.device), src_key_padding_mask=padding)
        return [row[:n] for row, n in zip(x, lengths.tolist())]


def sinusoids(length, dim, device):
    """(length, dim) sine and cosine positions."""
    angle = torch.arange(length, device=device)[:, None] / 10_000 ** (torch.arange(0, dim, 2, device=device) / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class WhisperEncoder(nn.Module):
    """The encoder of a Whisper checkpoint, in windows of 30 s, its padding cut away, pooled to 25 tokens a second.

    The first listen, where it has a rate of its own, is the average of these tokens.
    """
    TOKENS_PER_SECOND = 25

    def __init__(self, config, whisper, extractor):
        super().__init__()
        self.config, self.whisper, self.extractor, self.dim = config, whisper, extractor, whisper.config.d_model

    def n_tokens(self, n_samples, first_listen):
        full = math.ceil(n_samples * self.TOKENS_PER_SECOND / self.config.sample_rate)
        if first_listen and self.config.first_listen_rate:
            return math.ceil(full * self.config.first_listen_rate / self.TOKENS_PER_SECOND)
        return full

    def forward(self, waves, first_listen):
        device, window = waves[0].device, self.extractor.n_samples
        pieces = [piece for wave in waves for piece in wave.split(window)]
        inputs = self.extractor([p.cpu().numpy() for p in pieces], sampling_rate=self.config.sample_rate, return_tensors="pt")
        tokens = self.whisper(inputs.input_features.to(device, self.whisper.dtype)).last_hidden_state.float()  # (pieces, 1500, dim)
        tokens = F.avg_pool1d(tokens.transpose(1, 2), 2).transpose(1, 2)                                        # 50 -> 25 a second
        tokens = iter([t[:self.n_tokens(len(p), False)] for t, p in zip(tokens, pieces)])
        out = [torch.cat([next(tokens) for _ in wave.split(window)]) for wave in waves]
        if first_listen and self.config.first_listen_rate:
            out = [F.adaptive_avg_pool1d(t.T[None], self.n_tokens(len(w), True))[0].T for t, w in zip(out, waves)]
        return out


# ============================================================================================== 4 the model

@dataclass
class Span:
    """A piece of audio in the token sequence."""
    wave: torch.Tensor | None    # (N,) at the model's sample rate, until it was listened to
    start_s: float = 0.0         # where in its clip it starts: the time stamps of its tokens
    first_listen: bool = False
    features: torch.Tensor | None = None  # (n, encoder dim): the encoder is frozen, so listening once is enough

    def __post_init__(self):
        self.n_samples = len(self.wave)


@dataclass
class Sample:
    """The one representation of a text with audio in it: a flat list of ids in which each audio token is a placeholder."""
    ids: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # is the id at this position to be learned?
    position: list = field(default_factory=list)  # position ids; not always 0, 1, 2, ...: see add_span
    spans: list = field(default_factory=list)    # (index of the first placeholder, Span), in order

    def copy(self):
        return Sample(*(list(getattr(self, f.name)) for f in dataclasses.fields(self)))


class Echo(nn.Module):
    """Audio encoder (frozen outside its own training), projector, and a Qwen2 decoder."""

    def __init__(self, config, encoder, decoder, tokenizer):
        super().__init__()
        self.config, self.encoder, self.decoder, self.tokenizer = config, encoder, decoder, tokenizer
        dim = decoder.config.hidden_size
        scale = decoder.get_input_embeddings().weight.detach().float().std().item()
        self.projector = nn.Linear(encoder.dim, dim)
        self.stamp = nn.Linear(4 * dim, dim, bias=False)  # one map for each decimal place of a token's time
        nn.init.normal_(self.projector.weight, std=scale / encoder.dim ** 0.5)
        nn.init.zeros_(self.projector.bias)
        for place, block in enumerate(self.stamp.weight.data.split(dim, dim=1)):  # the ones' map: the digit as it is
            nn.init.eye_(block) if place == 2 else nn.init.orthogonal_(block, gain=0.5 if place < 2 else 1.0)
        one = lambda text: tokenizer.convert_tokens_to_ids(text)
        self.audio_id, self.seg_id, self.seg_end_id, self.answer_id = map(one, (AUDIO, "<seg>", "</seg>", "<answer>"))
        self.digit_ids = [tokenizer(str(d), add_special_tokens=False).input_ids[-1] for d in range(10)]
        stop = getattr(decoder.generation_config, "eos_token_id", None) or []
        self.eos_ids = {tokenizer.eos_token_id, *([stop] if isinstance(stop, int) else stop)}

    @property
    def device(self):
        return self.projector.weight.device

    def autocast(self):
        """bf16 arithmetic on CUDA over fp32 weights (an update of lr 1e-6 would vanish in bf16 weights); fp32 on CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # ------------------------------------------------------------------ pieces of text and audio -> Sample

    def add_text(self, sample, text, trained=False):
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if self.audio_id in ids:
            raise EchoError(f"the text {text[:60]!r} holds the reserved {AUDIO}; remove it")
        return self.add_ids(sample, ids, trained)

    def add_ids(self, sample, ids, trained=False):
        first = sample.position[-1] + 1 if sample.ids else 0
        sample.ids += ids
        sample.trained += [trained] * len(ids)
        sample.position += range(first, first + len(ids))
        return sample

    def add_span(self, sample, span):
        """Append placeholders for a span. All tokens of a re-listened segment share one position (share_position)."""
        n = self.encoder.n_tokens(span.n_samples, span.first_listen)
        sample.spans.append((len(sample.ids), span))
        self.add_ids(sample, [self.audio_id] * n)
        if self.config.share_position and not span.first_listen:
            sample.position[-n:] = [sample.position[-n]] * n
        return sample

    def prompt(self, audio, question, choices=()):
        """The Sample that a response continues: first listen and question, in the decoder's chat template if it has one.

        audio: the clip (N,), or its Span if it was listened to before."""
        text = self.config.prompt.format(question=question, choices=", ".join(choices))
        parts = ["", text]
        if self.tokenizer.chat_template:
            parts = self.tokenizer.apply_chat_template([{"role": "user", "content": AUDIO + text}], tokenize=False,
                                                       add_generation_prompt=True).split(AUDIO, 1)
        sample = self.add_text(Sample(), parts[0])
        self.add_span(sample, audio if isinstance(audio, Span) else Span(audio, first_listen=True))
        return self.add_text(sample, parts[1])

    def add_response(self, sample, text):
        """Append a whole response to learn, with eos."""
        return self.add_ids(self.add_text(sample, text, trained=True), [self.tokenizer.eos_token_id], trained=True)

    # ------------------------------------------------------------------ Samples -> tensors -> log-probs

    @torch.no_grad()
    def listen(self, spans, batch_s=480):
        """Encode the spans that have no features yet, in batches of at most `batch_s` seconds."""
        for first_listen in (True, False):
            todo = list({id(s): s for s in spans if s.features is None and s.first_listen == first_listen}.values())
            while todo:
                n = max(1, int(batch_s * self.config.sample_rate / max(s.n_samples for s in todo[:64])))
                batch, todo = todo[:min(n, 64)], todo[min(n, 64):]
                for span, tokens in zip(batch, self.encoder([s.wave.to(self.device) for s in batch], first_listen)):
                    span.features, span.wave = tokens, None

    def collate(self, samples, since=None, left=False):
        """The ids of each sample from index `since` on, as one padded batch: tensors of shape (B, T)."""
        since = since or [0] * len(samples)
        width = max(len(s.ids) - k for s, k in zip(samples, since))

        def pad(values):
            fill = [0] * (width - len(values))
            return fill + values if left else values + fill
        ids = torch.tensor([pad(s.ids[k:]) for s, k in zip(samples, since)])
        position = torch.tensor([pad(s.position[k:]) for s, k in zip(samples, since)])
        real = torch.tensor([pad([1] * (len(s.ids) - k)) for s, k in zip(samples, since)])
        spans = [span for s, k in zip(samples, since) for at, span in s.spans if at >= k]
        return ids.to(self.device), position.to(self.device), real.to(self.device), spans

    def embed(self, ids, spans):
        """(B, T) ids -> (B, T, D): token embeddings, with the spans' audio in the place of the placeholders."""
        table = self.decoder.get_input_embeddings()
        x = table(ids)
        if spans:
            self.listen(spans)
            times = torch.cat([torch.arange(len(s.features)) * self.token_s(s) + s.start_s for s in spans])
            tenths = (times * 10 + 1e-3).long().to(self.device)                          # (n,) time in tenths of a second
            digits = torch.stack([tenths // place % 10 for place in (1000, 100, 10, 1)], 1)
            stamps = self.stamp(table.weight[self.digit_ids][digits].flatten(1))         # (n, 4 D) -> (n, D)
            audio = self.projector(torch.cat([s.features for s in spans])) + stamps
            x = x.masked_scatter((ids == self.audio_id)[..., None], audio.to(x.dtype))
        return x

    def token_s(self, span):
        """Seconds from one audio token of a span to the next."""
        return 1 / (span.first_listen and self.config.first_listen_rate or self.encoder.TOKENS_PER_SECOND)

    def hidden(self, ids, position, mask, spans, cache=None):
        """(B, T, D) last hidden states; `mask` (B, cached + T) marks the real tokens."""
        with self.autocast():
            return self.decoder.model(inputs_embeds=self.embed(ids, spans), attention_mask=mask, position_ids=position,
                                      past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def log_softmax(self, hidden, temperature=1.0):
        """(n, D) -> (n, V) log-probs at a temperature; an audio token is never sampled."""
        with self.autocast():
            logits = self.decoder.lm_head(hidden)
        logits = logits.float().index_fill(1, torch.tensor([self.audio_id], device=self.device), -torch.inf)
        return torch.log_softmax(logits / temperature, dim=-1)

    def forward(self, samples, temperature=1.0):
        """Log-prob and entropy of every trained token, flat in the order of the samples: two tensors (n,).

        The head is applied to the positions before trained tokens alone, 512 at a time, and its output is not kept:
        with a vocabulary of 151,936 the logits of a whole batch would be larger than the model.
        """
        ids, position, mask, spans = self.collate(samples)
        hidden = self.hidden(ids, position, mask, spans)
        rows = [(row, t) for row, s in enumerate(samples) for t, trained in enumerate(s.trained) if trained]
        row, t = torch.tensor(rows, device=self.device).T
        before, target = hidden[row, t - 1], ids[row, t]                                 # (n, D), (n,)

        def head(before, target):
            logp = self.log_softmax(before, temperature)
            entropy = -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)
            return logp.gather(1, target[:, None])[:, 0], entropy.detach()
        parts = [checkpoint(head, b, g, use_reentrant=False) if len(target) > 512 else head(b, g)
                 for b, g in zip(before.split(512), target.split(512))]
        return tuple(map(torch.cat, zip(*parts)))

    @torch.no_grad()
    def log_probs(self, samples, temperature=1.0, tokens_per_batch=8192):
        """forward() without gradient and in micro-batches: the log-probs alone, (n,)."""
        return torch.cat([self([samples[i] for i in batch], temperature)[0]
                          for batch in micro_batches([len(s.ids) for s in samples], tokens_per_batch)])


def micro_batches(lengths, budget):
    """Split range(len(lengths)), in order, so that rows x longest row stays within a budget of tokens (or one row)."""
    batches, longest = [[]], 0
    for i, n in enumerate(lengths):
        longest = max(longest, n)
        if batches[-1] and longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = n
        batches[-1].append(i)
    return batches


def toy_tokenizer(texts):
    """A byte-level BPE tokenizer trained on the toy's texts: each of their words becomes one token, any text works.

    A word gets a space before it wherever it stands, so `<answer>bell` and `the bell` share their token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(Regex("^ (?=[^A-Za-z])"), "")])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|, (?=\d)| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(),
                                     decoders.Replace(Regex("(?<=<(think|answer|seg)>) "), ""),
                                     decoders.Replace(Regex(r"(?<=[^>\s])<seg>"), " <seg>")])
    trainer = trainers.BpeTrainer(vocab_size=2048, min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator([part for text in texts for part in re.split("<[^>]*>", text) if part], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def tiny_decoder(config, vocab_size):
    """A Qwen2 decoder small enough to learn from nothing in minutes.

    What a pretrained decoder has anyway, this one starts with: layer 0 looks at the tokens just before (equal biases
    of q and k are, under RoPE, a local kernel), layer 1 at distant tokens that look alike (q = k, and biases that
    push nearby tokens away), and both copy what they look at (o = v^T). Finding a sound by its name then takes
    about half the steps (one seed each: 1,180 against 2,280).
    """
    decoder = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=config.dim, intermediate_size=2 * config.dim, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, initializer_range=0.08, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))
    orthogonal = lambda: torch.linalg.qr(torch.randn(config.dim, config.dim)).Q
    per_head = config.dim // config.heads
    with torch.no_grad():
        for i, layer in enumerate(decoder.model.layers):
            attention = layer.self_attn
            layer.mlp.down_proj.weight *= 0.25
            if i < 2:
                attention.v_proj.weight.copy_(orthogonal())
                attention.o_proj.weight.copy_(0.08 * attention.v_proj.weight.T)
            else:
                attention.o_proj.weight *= 0.25
        local, alike = (layer.self_attn for layer in decoder.model.layers[:2])
        for projection in (local.q_proj, local.k_proj):
            projection.bias.copy_(torch.linspace(0.5, 2.0, config.heads).repeat_interleave(per_head))
        alike.q_proj.weight.copy_(1.2 * orthogonal())
        alike.k_proj.weight.copy_(alike.q_proj.weight)
        for projection, sign in ((alike.q_proj, -1), (alike.k_proj, 1)):
            projection.bias.view(config.heads, per_head)[:, :3] = 2.5 * sign  # the three fastest RoPE frequencies
    return decoder


def pretrained(load, name):
    """load(name), with one line for a name that is neither a folder nor reachable."""
    try:
        return load(name)
    except (OSError, ValueError, KeyError) as error:
        if Path(name).is_dir():
            raise EchoError(f"{name}: not a checkpoint of the kind needed here ({str(error).splitlines()[0][:120]})") from None
        raise EchoError(f"{name}: neither a folder here nor reachable; where there is a network, run: "
                        f"hf download {name} --local-dir {Path(name).name}, and give that folder") from None


def add_tags(decoder, tokenizer):
    """Make every tag one token; a new tag's embedding starts as the mean of its pieces'."""
    pieces = {t: tokenizer(t, add_special_tokens=False).input_ids for t in (*TAGS, AUDIO)}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in pieces])
    if len(tokenizer) > decoder.get_input_embeddings().weight.shape[0]:
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight):
            means = {t: table[p].mean(0) for t, p in pieces.items() if len(p) > 1}       # tied heads: the same twice
            for t, mean in means.items():
                table[tokenizer.convert_tokens_to_ids(t)] = mean


def build(config, texts=()):
    """A new model. `texts`: what the tiny decoder's tokenizer is trained on."""
    if config.decoder == "tiny":
        tokenizer = toy_tokenizer(texts)
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False, lstrip=t == "<seg>") for t in (*TAGS, AUDIO, "<|end|>")])
        decoder = tiny_decoder(config, len(tokenizer))
    else:
        tokenizer = pretrained(AutoTokenizer.from_pretrained, config.decoder)
        decoder = pretrained(lambda name: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), config.decoder)
        if decoder.config.model_type != "qwen2":
            raise EchoError(f"--decoder {config.decoder}: a {decoder.config.model_type} model; needed: a Qwen2 checkpoint")
        add_tags(decoder, tokenizer)
    if config.encoder == "small":
        encoder = SmallEncoder(config)
    else:
        whisper = pretrained(lambda name: WhisperModel.from_pretrained(name, dtype=torch.float32), config.encoder)
        encoder = WhisperEncoder(config, whisper.encoder, pretrained(WhisperFeatureExtractor.from_pretrained, config.encoder))
    return Echo(config, encoder, decoder, tokenizer)


@torch.no_grad()
def attention_shares(model, rollout):
    """The attention on audio tokens at each step of a response: (steps, 2), first listen and re-listened segments.

    Averaged over layers and heads; one uncached pass over the whole sequence gives every step at once.
    """
    implementation = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("eager")  # the one that returns its weights
    ids, position, mask, spans = model.collate([rollout.sample])
    weights = model.decoder.model(inputs_embeds=model.embed(ids, spans), attention_mask=mask, position_ids=position,
                                  output_attentions=True, use_cache=False).attentions
    model.decoder.set_attn_implementation(implementation)
    weights = torch.stack(weights).float().mean((0, 2))[0]                               # (T, T): layers and heads averaged
    audio = (ids[0] == model.audio_id).float()
    first = audio * (torch.arange(len(audio), device=audio.device) < rollout.n_prompt)
    steps = [t - 1 for t, trained in enumerate(rollout.sample.trained) if trained]
    return torch.stack([weights[steps] @ first, weights[steps] @ (audio - first)], 1).cpu()


# ============================================================================================== 5 segment tags

@dataclass
class Segment:
    """What a pair of tags asked for, and what came of it. `reason` says why it was not heard."""
    text: str
    start_s: float | None = None
    end_s: float | None = None
    heard: bool = False
    reason: str | None = None


TIME = r"(?:([0-9]+):(?=[0-5]?[0-9](?:[.\s,s]|$)))?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*s?"   # 2  2.5  .5  2.5s  2.5 s  1:02.5
SEGMENT = re.compile(rf"\s*{TIME}\s*,\s*{TIME}\s*")


REASONS = ("malformed", "reversed", "outside the clip", "too short", "too many turns", "text reasoning", "no room left")


def parse_segment(text, duration_s, turns=0, config=Config):
    """The text between <seg> and </seg> -> Segment. Never raises; `reason` is None if it can be heard, else one of
    the first five REASONS (`turns`: how many were heard before). The last two are given while decoding."""
    match = SEGMENT.fullmatch(text)
    if not match:
        return Segment(text, reason="malformed")
    m1, s1, m2, s2 = match.groups()
    start_s, end_s = float(m1 or 0) * 60 + float(s1), float(m2 or 0) * 60 + float(s2)
    reason = ("reversed" if end_s < start_s else
              "outside the clip" if not end_s <= duration_s + 1e-6 else
              "too short" if end_s - start_s < config.min_segment_s - 1e-6 else
              "too many turns" if turns >= config.max_turns else None)
    return Segment(text, start_s, end_s, reason=reason)


# ============================================================================================== 6 interleaved decoding

@dataclass
class Rollout:
    """A response being written, and its trace."""
    sample: Sample              # prompt, sampled ids and inserted audio
    wave: torch.Tensor          # the original clip
    n_prompt: int               # length of the prompt in ids
    logprobs: list = field(default_factory=list)  # of the sampled ids, at the sampling temperature
    segments: list = field(default_factory=list)  # a Segment for each </seg>
    ended: str | None = None    # "eos" or "length"
    text: str = ""              # the response as it was written
    confidence: float = 0.0     # the policy's probability of the first answer token

    @property
    def heard(self):
        return [s for s in self.segments if s.heard]


INSERTS = {  # what is heard when a segment is asked for; the last two are controls
    "segment": lambda wave, start, end, rng: wave[start:end],
    "random": lambda wave, start, end, rng: wave[(k := int(rng.integers(len(wave) - (end - start) + 1))):k + end - start],
    "silence": lambda wave, start, end, rng: torch.zeros_like(wave[start:end]),
}


@torch.no_grad()
def rollouts(model, prompts, waves, group=1, reasoning="interleaved", temperature=1.0, max_new_tokens=120,
             insert="segment", seeds=None, watch=None):
    """Decode `group` responses to each prompt, all rows in one batch with one KV cache. Returns Rollouts, prompt by prompt.

    prompts: Samples; waves: their clips, (N,). temperature 0 is greedy. seeds: one for each row; a row's draws
    depend on its seed alone, not on its neighbours. reasoning "text" hears nothing. watch(row, new ids, Segment or None).

    A row that closes a segment waits; when every row has closed one or ended, the waiting segments are encoded
    and prefilled together. New ids are padded on the left, so the last column is always each row's newest token.
    """
    rows = [Rollout(p.copy(), w, len(p.ids)) for p, w in zip(prompts, waves) for _ in range(group)]
    seeds = seeds if seeds is not None else range(len(rows))
    draws = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    cache = DynamicCache(config=model.decoder.config)
    ids, position, mask, spans = model.collate(prompts, left=True)
    hidden = model.hidden(ids, position, mask, spans, cache)[:, -1].repeat_interleave(group, 0)
    cache.batch_repeat_interleave(group)                          # each prompt is encoded once
    mask = mask.repeat_interleave(group, 0)
    cached = [r.n_prompt for r in rows]                           # ids of each row that the cache holds
    batch = list(range(len(rows)))                                # rows still in the cache
    running, waiting = list(batch), []
    while True:
        for i, (token, logp, confidence) in zip(running, sample_tokens(model, hidden, rows, running, draws, temperature)):
            add_token(model, rows[i], token, logp, confidence, reasoning, max_new_tokens)
            if token == model.seg_end_id and insert_segment(model, rows[i], insert, seeds[i]):
                waiting.append(i)
            if watch:
                watch(i, token, rows[i].segments[-1] if token == model.seg_end_id else None)
        running = [i for i in running if not rows[i].ended and i not in waiting]
        if not running:
            running, waiting = sorted(waiting), []
        if not running:
            break
        now, alive = set(running), set(running + waiting)
        if len(alive) <= len(batch) // 2:                         # drop ended rows from the cache
            keep = torch.tensor([k for k, i in enumerate(batch) if i in alive], device=mask.device)
            cache.batch_select_indices(keep)
            mask, batch = mask[keep], [i for i in batch if i in alive]
        since = [cached[i] if i in now else len(rows[i].sample.ids) for i in batch]
        ids, position, real, spans = model.collate([rows[i].sample for i in batch], since, left=True)
        mask = torch.cat([mask, real], 1)
        hidden = model.hidden(ids, position, mask, spans, cache)[[k for k, i in enumerate(batch) if i in now], -1]
        for i in running:
            cached[i] = len(rows[i].sample.ids)
    for r in rows:
        r.text = response_text(model, r)
    return rows


def sample_tokens(model, hidden, rows, running, draws, temperature):
    """The next (token, its log-prob, its probability) for each running row, by inverse CDF of the row's own draws."""
    logp = model.log_softmax(hidden, temperature or 1.0)                                 # (rows, V)
    if temperature:
        cdf = logp.exp().cumsum(-1)
        u = draws[running, [len(rows[i].logprobs) for i in running]].to(cdf) * cdf[:, -1]
        token = torch.searchsorted(cdf, u[:, None], right=True).clamp_max(cdf.shape[1] - 1)
    else:
        token = logp.argmax(-1, keepdim=True)
    chosen = logp.gather(1, token)
    return zip(token[:, 0].tolist(), chosen[:, 0].tolist(), chosen[:, 0].exp().tolist())


def add_token(model, row, token, logp, confidence, reasoning, max_new_tokens):
    """Append a sampled id; at </seg> note the segment in the trace, at eos or the limit end the row."""
    if row.sample.ids[-1] == model.answer_id and row.sample.trained[-1]:
        row.confidence = confidence
    model.add_ids(row.sample, [token], trained=True)
    row.logprobs.append(logp)
    if token == model.seg_end_id:
        row.segments.append(parse_segment(open_segment(model, row), len(row.wave) / model.config.sample_rate,
                                          len(row.heard), model.config))
        if reasoning == "text" and not row.segments[-1].reason:
            row.segments[-1].reason = "text reasoning"
    row.ended = "eos" if token in model.eos_ids else "length" if len(row.logprobs) >= max_new_tokens else None


def open_segment(model, row):
    """The text since the last <seg>, if no </seg> came in between; else what makes the tag malformed."""
    ids = row.sample.ids[row.n_prompt:-1]
    for k in range(len(ids) - 1, -1, -1):
        if ids[k] == model.seg_id:
            return model.tokenizer.decode(ids[k + 1:])
        if ids[k] == model.seg_end_id:
            break
    return "</seg> without <seg>"


def insert_segment(model, row, insert, seed):
    """Append the audio of the newest segment, cut from the original waveform: x' = x + o + enc(A[s:e]) of the paper."""
    segment = row.segments[-1]
    if segment.reason or row.ended:
        segment.reason = segment.reason or "no room left"
        return False
    start, end = (round(t * model.config.sample_rate) for t in (segment.start_s, segment.end_s))
    piece = INSERTS[insert](row.wave, start, end, np.random.default_rng([seed, len(row.segments)]))
    model.add_span(row.sample, Span(piece, segment.start_s))
    segment.heard = True
    return True


def response_text(model, row):
    """The sampled ids as text, without eos."""
    ids = [i for i, trained in zip(row.sample.ids, row.sample.trained) if trained and i not in model.eos_ids]
    return model.tokenizer.decode(ids)


# ============================================================================================== 7 rewards and GRPO

def extract_answer(text):
    """What stands in the one <answer> block, or None. There is no fall-back."""
    blocks = re.findall("<answer>(.*?)</answer>", text, re.S)
    return blocks[0].strip() if len(blocks) == 1 else None


def same_answer(a, b):
    """Are two answers the same? Case, outer punctuation and spacing don't count."""
    plain = lambda s: " ".join(s.casefold().split()).strip(" .,;:!?\"'")
    return plain(a) == plain(b)


def is_right(text, answer):
    """Is the extracted answer the true one?"""
    extracted = extract_answer(text)
    return extracted is not None and same_answer(extracted, answer)


def format_reward(text):
    """0.5 for exactly one well-formed think block, then exactly one answer block."""
    match = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.S)
    return 0.5 if match and not re.search("</?(think|answer)>", match[1] + match[2]) else 0.0


def consistency_reward(text):
    """-0.1 for every </seg> after which nothing is said of what was heard: a capital, a tag or the end; at least -0.5."""
    after = [part.lstrip() for part in text.split("</seg>")[1:]]
    # between adjacent tags the part after the first is "<seg>..." and so starts with "<"
    return max(-0.5, -0.1 * sum(not part or part[0] == "<" or part[0].isupper() for part in after))


def paper_reward(rollout, answer):
    """The four rewards of the paper, by name; their sum lies between -0.5 and 1.5."""
    right = is_right(rollout.text, answer)
    return {"format": format_reward(rollout.text), "consistency": consistency_reward(rollout.text),
            "accuracy": 0.5 * right, "segment": 0.5 * (right and bool(rollout.heard))}


def confidence_reward(rollout, answer):
    """The variant of the authors' script: accuracy weighs c, the policy's probability of the first answer token."""
    right, c = is_right(rollout.text, answer), rollout.confidence
    accuracy = 0.5 * (1 - (1 - c) ** 2) if right else -0.5 * c ** 2
    return {"format": format_reward(rollout.text), "consistency": consistency_reward(rollout.text),
            "accuracy": accuracy, "segment": accuracy * (right and bool(rollout.heard))}


REWARDS = {"paper": paper_reward, "confidence": confidence_reward}  # yours: one function (rollout, answer) -> {name: value}


def group_advantages(rewards, eps=1e-4):
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group: (questions, G) -> (questions, G). Flat groups get 0."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + eps)


def grpo_loss(logp, old_logp, ref_logp, advantage, clip=0.2, kl_weight=0.04):
    """The GRPO objective of each token (arXiv 2402.03300, eq. 3), as a loss; all arguments and results are (n,).

        ratio = exp(logp - old_logp)
        loss  = -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + kl_weight k3
        k3    = exp(ref - logp) - (ref - logp) - 1          (an unbiased, never negative estimate of KL(policy || ref))
    Returns loss, k3, and whether the ratio was clipped.
    """
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    clipped = (ratio * advantage > ratio.clamp(1 - clip, 1 + clip) * advantage).float()
    return -surrogate + kl_weight * k3, k3.detach(), clipped


def listening(responses):
    """What was listened to, over a list of Rollouts; each metric is defined in the README."""
    heard = [r.heard for r in responses]
    n, seconds = max(1, len(responses)), sum(s.end_s - s.start_s for h in heard for s in h)
    tags = [s.reason for r in responses for s in r.segments]
    return {"segments": sum(map(len, heard)) / n, "segment_s": seconds / max(1, sum(map(len, heard))),
            "overlap": (seconds - sum(map(covered, heard))) / max(seconds, 1e-9), "listened_once": sum(len(h) >= 1 for h in heard) / n,
            "listened_twice": sum(len(h) >= 2 for h in heard) / n, "length": sum(len(r.logprobs) for r in responses) / n,
            "truncated": sum(r.ended == "length" for r in responses) / n,
            "no_answer": sum(extract_answer(r.text) is None for r in responses) / n,
            "rejected": {reason: tags.count(reason) / len(tags) for reason in REASONS if reason in tags}}


def covered(segments):
    """Seconds in the union of some segments."""
    total, end = 0.0, 0.0
    for s in sorted(segments, key=lambda s: s.start_s):
        total, end = total + max(0.0, s.end_s - max(end, s.start_s)), max(end, s.end_s)
    return total


def interval(right, n):
    """The Wilson 95% interval of a share, right of n."""
    if not n:
        return 0.0, 1.0
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def response_weights(samples, n_responses):
    """(n,) weight of each trained token: the mean over a response's tokens, then over all `n_responses`."""
    return torch.cat([torch.full((sum(s.trained),), 1 / sum(s.trained) / n_responses) for s in samples])


# ============================================================================================== 8 checkpoints

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
    """Fill a new folder under a temporary name, then put it in the place of `folder`: whole or not at all."""
    folder = Path(folder)
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save(model, folder):
    """Decoder and tokenizer as transformers saves them, the rest as echo.safetensors, the config as echo.json."""
    def fill(tmp):
        model.decoder.save_pretrained(tmp)
        model.tokenizer.save_pretrained(tmp)
        rest = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("decoder.")}
        save_file(rest, tmp / "echo.safetensors")
        described = {"config": dataclasses.asdict(model.config)}
        if isinstance(model.encoder, WhisperEncoder):
            described["whisper"] = model.encoder.whisper.config.to_dict()
            described["extractor"] = model.encoder.extractor.to_dict()
        (tmp / "echo.json").write_text(json.dumps(described, indent=2))
    write_folder(folder, fill)


def load(folder, device="cpu"):
    """The model that save() wrote to a folder, or to the folder's model/; in eval mode."""
    folder = Path(folder)
    folder = folder if (folder / "echo.json").is_file() else folder / "model"
    if not (folder / "echo.json").is_file():
        raise EchoError(f"{folder.parent}: no Echo checkpoint there (no echo.json); train one, or give another folder with --model")
    try:
        described = json.loads((folder / "echo.json").read_text())
        config = Config(**described["config"])
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # as saved; AutoTokenizer would make it Qwen's
        if "whisper" in described:
            whisper = WhisperModel(WhisperConfig(**described["whisper"])).encoder
            encoder = WhisperEncoder(config, whisper, WhisperFeatureExtractor(**described["extractor"]))
        else:
            encoder = SmallEncoder(config)
        model = Echo(config, encoder, decoder, tokenizer)
        missing = model.load_state_dict(load_file(folder / "echo.safetensors"), strict=False)
        lost = [k for k in missing.missing_keys if not k.startswith("decoder.")] + missing.unexpected_keys
        if lost:
            raise ValueError(f"{lost[0]} does not fit")
    except EchoError:
        raise
    except Exception as error:
        raise EchoError(f"{folder}: broken checkpoint, {str(error).splitlines()[0][:160]}") from None
    return model.to(device).eval()


# ============================================================================================== 9 rows of data

def write_jsonl(path, rows):
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path, needs=()):
    """Rows of a JSON list or of JSON lines, each a dict with text under the keys `needs`."""
    path = Path(path)
    if not path.is_file():
        raise EchoError(f"{path}: no such file; python make_data.py makes the toy's data/")
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        where = f"row {number}" if "number" in locals() else f"line {error.lineno}"
        raise EchoError(f"{path}, {where}: not JSON ({error.msg})") from None
    for number, row in enumerate(rows, 1):
        lacking = [k for k in needs if not isinstance(row, dict) or not row.get(k)]
        if lacking:
            raise EchoError(f"{path}, row {number}: no {lacking[0]!r}; needed: {', '.join(needs)}")
    if not rows:
        raise EchoError(f"{path}: no rows")
    return rows


@dataclass
class Question:
    """A row in the published formats: the native one, MMAR's (choices) or MMAU's (audio_id, choices)."""
    row: dict
    path: Path
    question: str
    choices: list
    answer: str | None
    category: str


def read_questions(path, audio_root=None, needs=("answer",)):
    """Questions of a data file. Audio paths are relative to `audio_root`, by default the data file's folder."""
    questions = []
    for number, row in enumerate(read_rows(path, ("question", *needs)), 1):
        audio, choices = row.get("audio_path") or row.get("audio_id"), row.get("multi_choice", row.get("choices"))
        if not isinstance(audio, str):
            raise EchoError(f"{path}, row {number}: no 'audio_path' (or 'audio_id')")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
            raise EchoError(f"{path}, row {number}: no 'multi_choice' (or 'choices'), a list of texts")
        category = row.get("category") or row.get("task") or "all"
        questions.append(Question(row, Path(audio_root or Path(path).parent) / audio, row["question"], choices,
                                  row.get("answer"), str(category)))
    return questions


class Clips:
    """Spans of audio files, each encoded once, by itself: then a run that was killed goes on with the very same numbers."""

    def __init__(self, model):
        self.model, self.spans = model, {}

    def span(self, path, start_s=None, end_s=None):
        """The first listen of a clip, or a re-listened segment of it."""
        key = (path, start_s, end_s)
        if key not in self.spans:
            rate = self.model.config.sample_rate
            wave = load_audio(path, rate)
            self.spans[key] = Span(wave, first_listen=True) if start_s is None else Span(cut(wave, start_s, end_s, rate), start_s)
            self.model.listen([self.spans[key]])
        return self.spans[key]


# ============================================================================================== 10 a training run

def pick_device(name="auto"):
    """The device of this process; under torchrun also its rank and the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EchoError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, int(os.environ.get("RANK", 0)), world


def linear_schedule(step, steps, warmup=0, final=0.0):
    """Factor on the learning rate: linear warm-up, then linear to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * max(0.0, (steps - step) / max(1, steps - warmup))


def fixed(settings):
    """The settings that a run can't change on the way, as a dict."""
    free = ("out", "device", "save_every", "log_every", "tokens_per_batch", "checkpointing", "retrain", "stage")
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}


def same_settings(folder, before, now):
    for k, v in now.items():
        if before.get(k, v) != v:
            raise EchoError(f"{folder} was begun with {k} = {before[k]}, now it is {v}; give the same value, another --out, or --retrain")


def finished(folder, settings, retrain, rank, world):
    """Does the folder hold the model of a finished run with these settings? `retrain` removes it first."""
    folder = Path(folder)
    if retrain and rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if world > 1:
        torch.distributed.barrier()
    if not (folder / "model" / "echo.json").is_file():
        return False
    begun = folder / "settings.json"
    same_settings(folder, json.loads(begun.read_text()) if begun.is_file() else {}, settings)
    if rank == 0:
        print(f"{folder}: already trained (--retrain trains it again)")
    return True


class Training:
    """Optimiser, log and saves of one training, which may be killed at any moment and run again.

    All randomness of a training is drawn from (seed, step), so step, weights and optimiser are all there is to save.
    `state` is a dict of numbers that the loop wants saved too; `settings` a dict, the same when a run goes on.
    Under torchrun every process holds one; `rank` of `world`.
    """
    def __init__(self, folder, module, settings, device, rank=0, world=1, betas=(0.9, 0.95)):
        self.folder, self.module, self.rank, self.world = Path(folder), module, rank, world
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
        self.settings, self.step, self.state, self.log_bytes = settings, 0, {}, 0
        self.resume(device)
        self.ddp = DistributedDataParallel(module) if world > 1 else module

    def saves(self):
        return sorted(p for p in (self.folder / "saves").glob("step-*") if p.suffix not in (".tmp", ".old"))

    def resume(self, device):
        if self.saves():
            path = self.saves()[-1]
            saved = torch.load(path / "training.pt", map_location=device, weights_only=True)
            same_settings(self.folder, saved["settings"], self.settings)
            self.module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.state, self.log_bytes = saved["step"], saved["state"], saved["log_bytes"]
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=2))
            with open(self.folder / "log.jsonl", "ab") as log:  # what was logged after the last save happens again
                log.truncate(self.log_bytes)

    def save(self):
        """Save everything, atomically; keep the last two saves."""
        if self.rank == 0:
            saved = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                     "state": self.state, "log_bytes": self.log_bytes, "settings": self.settings}
            write_folder(self.folder / "saves" / f"step-{self.step:06d}", lambda tmp: torch.save(saved, tmp / "training.pt"))
            for old in self.saves()[:-2]:
                shutil.rmtree(old)
        if self.world > 1:
            torch.distributed.barrier()

    def log(self, **metrics):
        """One line for people and one JSON line; rank 0 alone."""
        metrics = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in {"step": self.step, **metrics}.items()}
        if self.rank == 0:
            show = lambda v: f"{v:.3g}" if isinstance(v, float) else json.dumps(v) if isinstance(v, dict) else v
            tqdm.write("  ".join(f"{k} {show(v)}" for k, v in metrics.items()))
            with open(self.folder / "log.jsonl", "ab") as log:
                log.write((json.dumps(metrics) + "\n").encode())
                self.log_bytes = log.tell()

    def batch(self, n, size, seed):
        """This process's share of the step's batch: indices into n rows, each once an epoch, in an order drawn from `seed`."""
        at = np.arange(self.step * size, (self.step + 1) * size)
        order = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in set(at // n)}
        return [int(order[k // n][k % n]) for k in at][self.rank::self.world]

    def sum(self, *values):
        """The sum of each value over all processes."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.parameters[0].device, torch.float32 if self.parameters[0].is_cuda else torch.float64)
            torch.distributed.all_reduce(total)
        return total.tolist()

    def mean(self, metrics, n):
        """The mean of a dict of metrics over all processes, this one's counted n times; shares in `rejected` too."""
        flat = {k: v for k, v in metrics.items() if k != "rejected"} | {r: metrics.get("rejected", {}).get(r, 0.0) for r in REASONS}
        total, *values = self.sum(n, *(n * v for v in flat.values()))
        flat = {k: v / total for k, v in zip(flat, values)}
        return {k: v for k, v in flat.items() if k not in REASONS} | {"rejected": {r: flat[r] for r in REASONS if flat[r]}}

    def backward(self, samples, loss, tokens_per_batch, temperature=1.0):
        """Accumulate the gradient of loss(slice of the trained tokens, logp, entropy), a sum, over micro-batches."""
        batches, done = micro_batches([len(s.ids) for s in samples], tokens_per_batch), 0
        for batch in batches:
            with self.ddp.no_sync() if self.world > 1 and batch is not batches[-1] else nullcontext():
                logp, entropy = self.ddp([samples[i] for i in batch], temperature)
                value = loss(slice(done, done + len(logp)), logp, entropy)
                (value * self.world).backward()                  # DDP averages over processes; we sum
            done += len(logp)

    def update(self, lr, clip=1.0):
        """One step of the optimiser on the clipped gradient."""
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        if not norm.isfinite():
            raise EchoError(f"{self.folder}, step {self.step}: the gradient is not finite; the last save is good, go on from it with a lower learning rate in another --out")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def evaluate(training, model, questions, reasoning, max_new_tokens, batch=50):
    """Greedy accuracy, by category too, and what was listened to; split over the processes. Returns metrics to log."""
    mine, responses = questions[training.rank::training.world], []
    model.eval()
    for at in tqdm(range(0, len(mine), batch), desc="evaluation", leave=False, disable=training.rank > 0):
        waves = [load_audio(q.path, model.config.sample_rate) for q in mine[at:at + batch]]
        prompts = [model.prompt(w, q.question, q.choices) for w, q in zip(waves, mine[at:at + batch])]
        responses += rollouts(model, prompts, waves, 1, reasoning, 0.0, max_new_tokens)
    categories = sorted({q.category for q in questions})
    right = [(q.category, is_right(r.text, q.answer)) for q, r in zip(mine, responses)]
    counts = [sum(ok for c, ok in right if c == category) for category in categories]
    total = training.sum(*counts)
    metrics = {"eval_accuracy": sum(total) / len(questions)}
    metrics |= {f"eval_{c}": t / sum(q.category == c for q in questions) for c, t in zip(categories, total)}
    return metrics | {f"eval_{k}": v for k, v in training.mean(listening(responses), len(responses)).items()}
