"""Stage 1 of Echo, and before it a stand-in for the pretrained audio model that it starts from.

    python train_sft.py                                     # from data/ to runs/sft
    python train_sft.py --decoder DIR --out runs/qwen       # a pretrained Qwen2 as the decoder

encoder   sound-event detector, then frozen for good, and the projector's start     runs/encoder
base      decoder and projector learn what is heard where, and to count it          runs/base
sft       the paper's stage 1: grounded chains, text only                           runs/sft

    python train_sft.py --model DIR --data ROWS --out OUT   # sft alone, from a model of your own

A stage that has its model/ is skipped (delete its folder to train it again); a killed one goes on.
"""
# SPDX-License-Identifier: MIT
import contextlib
import functools
import hashlib
import io
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

from echo import (SAMPLE_RATE, THUMBNAIL_RATE, TOKENS_PER_SECOND, Config, Echo, EchoError, batches,
                  cut, first_line, has_model, load, main, make_encoder, model_folder,
                  optimizer_step, parse_settings, pick_device, processes, ran_out, read_decoder,
                  save, sft_loss, split_segments, sum_over_processes)
from make_data import (NUMBERS, QUESTIONS, check_rows, exact, from_edge, load_audio, lock,
                       look_for, name_of, pick, point_to, questions_about, read_questions,
                       read_rows, segment_of, write_atomically, write_row)


@dataclass
class Settings:
    model: str = ""                  # a model's folder: sft starts there, without encoder and base
    data: str = "data/sft.jsonl"     # rows with chains (cot), for sft
    clips: str = "data/clips.jsonl"  # clips with their A4_events, for encoder and base
    audio_root: str = ""             # paths in data are relative to it, or to the file's folder
    out: str = "runs"                # each stage writes a folder in it
    decoder: str = "tiny"            # or a Qwen2 checkpoint: a name or a local folder
    encoder: str = "small"           # or a Whisper checkpoint: a name or a local folder
    thumbnail: bool = True           # --no-thumbnail: the first listen is at the full rate
    encoder_steps: int = 1200        # of 24 pieces and 8 clips; for Whisper give 100
    base_steps: int = 1600
    base_batch: int = 6
    base_lr: float = 8e-4
    sft_steps: int = 300             # the paper: one epoch of 75.9k rows
    sft_batch: int = 16
    sft_lr: float = 5e-4             # the paper: 5e-6, for 7 billion parameters
    projector_rate: float = 1.0      # the projector's learning rate, as a factor
    micro_batch: int = 3             # rows in one pass; gradients are accumulated over them (with
                                     # 8 the base is 1.2x as slow, since rows differ in length)
    bf16: bool = False               # bf16 arithmetic in the decoder
    seed: int = 0                    # of the weights and of every draw
    save_every: int = 250            # steps

# With a pretrained decoder the defaults are, as measured for the README:
PRETRAINED = dict(base_steps=600, base_batch=8, base_lr=5e-5, sft_steps=20, sft_batch=8,
                  sft_lr=2e-5, projector_rate=0.2, micro_batch=8, save_every=40,
                  bf16=torch.cuda.is_available())


def train_sft(model, training, rows, settings):
    """The paper's stage 1: chains that point at segments, as text. No audio follows a tag here."""
    heard = features_of(model)
    for _ in training.steps(settings.sft_steps, "sft"):
        samples = []
        for i in training.batch(len(rows), settings.sft_batch):
            first_listen, _ = heard(rows[i].path)
            prompt = model.prompt(first_listen, rows[i].question, rows[i].choices)
            samples.append(model.add_response(prompt, rows[i].row["cot"]))
            if len(prompt.ids) > model.decoder.config.max_position_embeddings:
                raise EchoError(f"{settings.data}: {name_of(rows[i])}: longer "
                                "than the decoder's context; leave it out")
        update(model, training, samples, settings.sft_lr, settings.sft_steps)


def update(model, training, samples, lr, steps):
    """One of `steps` updates, on the rows of all processes; lr: the highest of them."""
    n_tokens, total = sum_over_processes(sum(sum(s.trained) for s in samples)), 0.0
    alike = sorted(samples, key=lambda sample: len(sample.ids))  # in length: less padding
    for some in batches(alike, training.settings.micro_batch):
        loss = sft_loss(model, some, n_tokens)
        loss.backward()
        total += loss.item()
    lr *= linear_schedule(training.step, steps)
    training.set_lr(lr)
    optimizer_step(training.optimizer)
    training.step += 1
    training.log({"loss": sum_over_processes(total), "lr": lr}, show=("loss",), every=25)


def linear_schedule(step, steps, warmup=0.05, final=0.0):  # warm-up: the paper's, of SFT
    """Factor on the learning rate: linear warm-up over a share of the steps, linear to `final`."""
    up = (step + 1) / max(1, warmup * steps)
    return min(1.0, up, final + (1 - final) * (steps - step) / max(1, steps - warmup * steps))


def fingerprint(*paths):
    """A hash of what files hold, and the files of folders: moved or copied, it stays the same."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            dotted = any(part.startswith(".") for part in file.relative_to(path).parts)
            if not dotted and (file.is_file() or not path.is_dir()):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# Settings that do not change what a training learns; inputs count by their fingerprint:
NO_EFFECT = ("out", "model", "data", "clips", "test", "audio_root", "save_every", "eval_every",
             "micro_batch")


def stamp(settings, inputs, later=()):
    """What a training's result depends on: settings, and {name: paths} of its inputs, which may not
    hold its output. later: how names begin that only matter to later stages."""
    kept = {name: value for name, value in asdict(settings).items()
            if name not in NO_EFFECT and not name.startswith(tuple(later))}
    models = {name: [kept[name]] for name in ("decoder", "encoder")
              if kept.get(name, "tiny") not in ("tiny", "small") and Path(kept[name]).is_dir()}
    out = Path(settings.out).resolve()
    for path in sum((models | inputs).values(), []):
        if Path(path).resolve() in (out, *out.parents, out / "log.jsonl", out / "settings.json"):
            raise EchoError(f"--out {settings.out} lies in its own input, {path}; give another")
    return kept | {name: fingerprint(*paths) for name, paths in (models | inputs).items()}


def is_finished(folder, wanted):
    """Does the folder hold the trained model? Another training's folder is refused. wanted: the
    stamp() of this one."""
    folder = Path(folder)
    model = folder / "model"
    empty = model.is_dir() and not os.listdir(model)
    if model.exists() and not empty and not has_model(folder):  # save() would delete it
        raise EchoError(f"{model}: not a trained model (no echo.json); move it away, or give "
                        "another --out")
    if has_model(folder) or (folder / "training.pt").exists():
        began = None
        with contextlib.suppress(OSError, ValueError, TypeError):
            began = dict(json.loads((folder / "settings.json").read_text()))
        if began is None:
            raise EchoError(f"{folder / 'settings.json'}: lost or broken, so it is not known what "
                            f"{folder} was trained from; delete that folder, or give another --out")
        other = [name for name in began | wanted if began.get(name) != wanted.get(name)]
        if other:
            raise EchoError(f"{folder} was begun with another {', '.join(other)}; give the same, "
                            "or another --out, or delete that folder")
    if has_model(folder) and processes()[0] == 0:
        print(f"{folder}: already trained (to train it again, delete that folder)")
    return has_model(folder)


class Optimizers:
    """AdamW; with `muon`, Muon at 2.5 times its rate for the matrices of the decoder's layers: the
    base stage takes 1.4 times fewer steps to the same loss. groups: {name of a weight: group}."""

    def __init__(self, groups, muon):
        matrices = [group for name, group in groups.items() if muon and
                    name.startswith("decoder.model.layers.") and group["params"][0].ndim == 2]
        for group in matrices:
            group["rate"] *= 2.5
        rest = [group for group in groups.values() if all(group is not m for m in matrices)]
        self.all = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
        if matrices:
            self.all.append(torch.optim.Muon(matrices, weight_decay=0.0,
                                             adjust_lr_fn="match_rms_adamw"))

    @property
    def param_groups(self):
        return [group for one in self.all for group in one.param_groups]

    def step(self):
        for one in self.all:
            one.step()

    def zero_grad(self):
        for one in self.all:
            one.zero_grad()

    def state_dict(self):
        return [one.state_dict() for one in self.all]

    def load_state_dict(self, saved):
        for one, state in zip(self.all, saved, strict=True):
            one.load_state_dict(state)


class Training:
    """Optimiser, log and save of one training, which may be killed at any moment and run again.
    All randomness of a training is drawn from (seed, step): step, trained weights and optimiser are
    all there is to save. `rates`: factors on the learning rate of parts of the module."""

    def __init__(self, folder, module, settings, wanted, rates={}, muon=False):
        self.folder, self.settings, self.step = Path(folder), settings, 0
        self.rank, self.world = processes()
        self.trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        groups = {k: {"params": [p], "rate": rates.get(k.split(".")[0], 1.0)}
                  for k, p in self.trained.items()}
        self.optimizer = Optimizers(groups, muon)
        self.file = self.folder / "training.pt"
        self.lines = []  # of log.jsonl
        if self.file.is_file():
            try:
                saved = torch.load(self.file, map_location="cpu", weights_only=True)
                module.load_state_dict(saved["trained"], strict=False)
                self.optimizer.load_state_dict(saved["optimizer"])
                self.step, self.lines = saved["step"], saved["lines"]
            except Exception as error:  # torch has many for a broken file
                if ran_out(error):
                    raise
                raise EchoError(f"{self.file}: broken ({first_line(error)}); delete it to begin "
                                "again") from None
        if sum_over_processes(self.step) != self.step * self.world:
            raise EchoError(f"{self.file}: not the same on all machines; share the folder")
        if self.rank == 0:
            write_atomically(self.folder / "settings.json", json.dumps(wanted, indent=2))
            self.write_log()  # without what came after the save: it happens again

    def write_log(self):
        write_atomically(self.folder / "log.jsonl", "".join(self.lines))

    def steps(self, n, desc):
        """The steps still to do (the loop's body counts self.step), every few of them a save."""
        for step in tqdm(range(self.step, n), desc, initial=self.step, total=n,
                         disable=self.rank > 0):
            yield step
            if self.step % self.settings.save_every == 0:
                self.save()

    def save(self):
        if self.rank == 0:
            saved = {"trained": {k: p.detach() for k, p in self.trained.items()},
                     "optimizer": self.optimizer.state_dict(), "step": self.step,
                     "lines": self.lines}
            content = io.BytesIO()
            torch.save(saved, content)
            write_atomically(self.file, content.getbuffer())

    def finish(self, model):
        """Save the trained model; the save on the way is no longer needed."""
        if self.rank == 0:
            save(model, self.folder / "model")
            self.write_log()  # whole, whatever happened to the file
            self.file.unlink(missing_ok=True)
        if self.world > 1:
            torch.distributed.barrier()

    def batch(self, n, size):
        """This process's share of a step's batch: indices into n rows, each once an epoch."""
        seed, at = self.settings.seed, np.arange(self.step * size, (self.step + 1) * size)
        order = {e: np.random.default_rng([seed, e]).permutation(n) for e in set(at // n)}
        return [int(order[k // n][k % n]) for k in at][self.rank::self.world]

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]

    def log(self, metrics, show=(), every=1):
        """A JSON line with all metrics; some of them also as a line for people, every few steps."""
        if self.rank:
            return
        entry = {"step": self.step} | {k: float(f"{v:.7g}") for k, v in metrics.items()}
        if self.step % every == 0:
            tqdm.write(f"step {self.step}  " + "  ".join(
                f"{k} {entry[k]:.3g}" for k in show if k in entry))
        self.lines.append(json.dumps(entry) + "\n")
        with contextlib.suppress(OSError), open(self.folder / "log.jsonl", "a") as log:
            log.write(self.lines[-1])  # finish() writes all of it


def features_of(model, keep=4096):
    """A function that remembers: path of a clip, (start_s, end_s) of segments -> features of the
    clip's first listen, and {tag: features at the full rate}; `keep`: clips kept."""
    @functools.lru_cache(keep)
    def heard(path, segments=()):
        wave = load_audio(path)
        pieces = [cut(wave, *segment) for segment in segments]
        for (start_s, _), piece in zip(segments, pieces):
            if not len(piece):
                raise EchoError(f"{path}: the clip ends before its event at {start_s} s")
        tags = [f"<seg>{start_s:.1f}, {end_s:.1f}</seg>" for start_s, end_s in segments]
        return model.hear([wave], first_listen=True)[0], dict(zip(tags, model.hear(pieces)))
    return heard


# ==================================================================================================
# From here to run_stage: a stand-in for a pretrained audio model.

def tiny_tokenizer(texts):
    """Byte-level BPE trained on the toy's texts: their words, tags and times become one token each,
    and any other text still works."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    words = tokenizers.Regex(r" ?</?[a-z]+>| ?\d+\.\d| ?\w[\w-]*|[^\w\s]|\s+")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(words, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, 4096, show_progress=False, special_tokens=["<|end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()), eos_token="<|end|>")


def tiny_decoder(vocab_size, dim=128, layers=4, heads=4):
    """A Qwen2 decoder that learns from nothing in minutes: it starts with an induction head, which
    any pretrained decoder has (arXiv 2209.11895). Layer 0 copies each token's predecessor into a
    subspace of its own; layer 1 looks for tokens with the same predecessor and copies them. After
    "the hum <seg>" that is what stands after the audio token that sounds like a hum: its time."""
    decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=vocab_size, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        initializer_range=0.08, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    half = dim // heads // 2
    angle = 1e4 ** (-torch.arange(half) / half)         # RoPE's turn a position, one a pair of dims
    predecessor, induction = (layer.self_attn for layer in decoder.model.layers[:2])
    turn, first, second = (torch.linalg.qr(torch.randn(dim, dim)).Q for _ in range(3))
    with torch.no_grad():
        for layer in decoder.model.layers:
            layer.mlp.down_proj.weight *= 0.25
        for layer in decoder.model.layers[2:]:
            layer.self_attn.o_proj.weight *= 0.25
        # layer 0: constant q and k, k turned by one position, match best one position back
        for projection, shift in ((predecessor.q_proj, 0), (predecessor.k_proj, 1)):
            projection.weight *= 0.1
            bias = projection.bias.view(heads, 2, half)
            bias[:, 0, :3] = 7.0 * torch.cos(shift * angle[:3])
            bias[:, 1, :3] = 7.0 * torch.sin(shift * angle[:3])
        predecessor.v_proj.weight.copy_(first)
        predecessor.o_proj.weight.copy_(0.08 * turn @ first.T)
        # layer 1: q = k on that subspace, in the dims that RoPE hardly turns over a clip's length;
        # constants in others, of two heads, against near matches: a token matches itself best
        slow = (angle < 0.015).repeat(2 * heads)[:, None]
        for projection, sign in ((induction.q_proj, 1), (induction.k_proj, -1)):
            projection.weight *= 0.1
            projection.weight += 2.4 * slow * second @ turn.T
            projection.bias.view(heads, 2, half)[:2, 0, 2:7] = 4.0 * sign
        induction.v_proj.weight.copy_(first)
        induction.o_proj.weight.copy_(0.08 * first.T)
    return decoder


def new_model(settings, described):
    """Encoder and decoder as the flags say; the tiny tokenizer is trained on the data's words."""
    config = Config(settings.encoder, settings.decoder, settings.thumbnail)
    encoder = make_encoder(settings.encoder)
    if settings.decoder != "tiny":
        config.max_new_tokens = 512
        return Echo(config, encoder, *read_decoder(settings.decoder))
    texts = [f"{t / 10:.1f}" for t in range(300)] * 2
    texts += [" Describe the and what comes after it. end"] * 2
    for _, events in described:
        for row in questions_about(events):
            choices = json.dumps([row["answer"], row["name"]])
            texts.append(f" {row['question']} Choose from {choices}.\n{row['cot']}")
    tokenizer = tiny_tokenizer(texts)
    return Echo(config, encoder, tiny_decoder(len(tokenizer)), tokenizer)


def read_clips(settings):
    """The described clips, [(path, events in order of time), ...], and their kinds of sound."""
    root, described = Path(settings.clips).parent, []
    for number, row in enumerate(read_rows(settings.clips, ("audio_path",)), 1):
        try:
            events = sorted(row["A4_events"], key=lambda e: e["start_s"])
            good = {q["category"] for q in questions_about(events)} == set(QUESTIONS)
            good &= all(e["kind"].strip() and 0 <= e["start_s"] < e["end_s"] - 0.11 for e in events)
            good &= all(a["end_s"] < b["start_s"] + 0.02 for a, b in zip(events, events[1:]))
            good &= "\0" not in row["audio_path"]
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
            good = False
        if not good:
            raise EchoError(f"{settings.clips}, row {number}: needs 'A4_events' one after another, "
                            "with kind, start_s, end_s (over 0.1 s later), 2 to 6 pulses, for each "
                            "kind of question")
        described.append((root / row["audio_path"], events))
    kinds = sorted({e["kind"] for _, events in described for e in events})
    if len(kinds) < 5:
        raise EchoError(f"{settings.clips}: {len(kinds)} kinds of sound; needed: five or more")
    return described, kinds


class Detector(nn.Module):
    """Sound-event detector: the encoder, and linear heads. One gives each token the embedding of
    the words for what it holds, and becomes the projector. Two count at the full rate: how many
    pulses of the same sound came before, and how many are left? (With one head for "which of how
    many" 95% of the counts are right, since a neighbour's pulses are taken for more of the same;
    with two 99%.) A pretrained encoder stays as it is."""

    def __init__(self, model, kinds):
        super().__init__()
        self.kinds, self.encoder = kinds, model.encoder
        self.encoder.requires_grad_(not model.encoder.pretrained)
        table = model.decoder.get_input_embeddings().weight.detach()
        self.names, self.details = (torch.stack(
            [*(table[model.tokenize(" " + word)].mean(0) for word in words), 0 * table[0]])
            for words in ([*kinds, "and"], [*NUMBERS.values(), "end"]))
        self.scale = self.names[0].square().mean().sqrt()
        self.words = nn.Linear(model.encoder.dim, table.shape[1])
        self.before = nn.Linear(model.encoder.dim, max(NUMBERS))
        self.left = nn.Linear(model.encoder.dim, max(NUMBERS))

    def labels(self, events, start_s, n, rate):
        """What n tokens from `start_s` on hold, -1 for nothing or not known, (4, n): indices into
        names and details, pulses before, pulses left. At the full rate a pulse has its kind's name,
        a gap has none, and its detail is the sound's number, if the whole sound is there. A
        thumbnail's token has the name of the sound that begins in it, or "and" if one goes on; its
        detail is "end" if one ends in it."""
        kind, detail, before, left = torch.full((4, n), -1)
        for e in events:
            first, after = (round((t_s - start_s) * rate) for t_s in segment_of(e))
            if rate == THUMBNAIL_RATE:
                kind[first + 1:after - 1] = len(self.kinds)
                kind[first:first + 1] = self.kinds.index(e["kind"])
                detail[after - 1:after] = len(NUMBERS)
            elif first <= n and after >= 0:  # it may reach into this piece
                time = start_s + (torch.arange(n) + 0.5) / rate  # the middle of each token
                share = (time - e["start_s"]) / (e["end_s"] - e["start_s"])
                inside = (share > 0) & (share < 1)
                kind[inside & (from_edge(e["pulses"], share) > 0)] = self.kinds.index(e["kind"])
                nth = (share * e["pulses"]).long()[inside]
                if first >= 0:
                    before[inside] = nth
                if after <= n:
                    left[inside] = e["pulses"] - 1 - nth
                if first >= 0 and after <= n:
                    detail[inside] = list(NUMBERS).index(e["pulses"])
        return torch.stack([kind, detail, before, left])

    def forward(self, waves, labels, thumbnail):
        """Waveforms (B, N), labels (B, 4, n) -> mean loss of a token."""
        x = self.encoder(waves, thumbnail)
        kind, detail, before, left = labels.unbind(1)
        target = (self.names[kind] + self.details[detail]) / self.scale
        loss = F.mse_loss(self.words(x), target)
        for counts, truth in ((self.before(x), before), (self.left(x), left)):
            counted = F.cross_entropy(counts.flatten(0, 1), truth.flatten(), reduction="sum",
                                      ignore_index=-1)
            loss = loss + 1.5 * counted / truth.numel()
        return loss

    @torch.no_grad()
    def grade(self, clips, thumbnail):
        """Share of the sounds whose kind is right in the first listen, and whose count is right at
        the full rate. clips: [(wave, events), ...]."""
        right = {"kinds_right": [], "counts_right": []}
        for wave, events in clips:
            wave = wave[None].to(self.names.device)
            first = self.words(self.encoder(wave, thumbnail))[0]
            rate = THUMBNAIL_RATE if thumbnail else TOKENS_PER_SECOND
            for e in events:
                start_s, end_s = segment_of(e)
                pulse_s = e["start_s"] + (e["end_s"] - e["start_s"]) / e["pulses"] / 2
                at = int((start_s if thumbnail else pulse_s) * rate)  # the first pulse's middle
                far = (first[at] - self.names[:len(self.kinds)] / self.scale).square().sum(1)
                right["kinds_right"].append(self.kinds[far.argmin()] == e["kind"])
                x = self.encoder(cut(wave[0], start_s, end_s)[None], False)[0]
                inside = self.labels([e], start_s, len(x), TOKENS_PER_SECOND)[2] >= 0
                said = self.before(x[inside]).argmax(1) + 1 + self.left(x[inside]).argmax(1)
                right["counts_right"].append(said.mode().values.item() == e["pulses"])
        return {name: sum(x) / len(x) for name, x in right.items() if x}


def piece_start(events, rng):
    """Where a piece to learn counting on begins, in s: at a sound's segment, or for half of them up
    to half a second earlier. Counting is hard where a neighbour reaches into the segment: half of
    the pieces are about such sounds, if there are any."""
    pairs = [pair for pair in zip(events, events[1:])
             if segment_of(pair[0])[1] > segment_of(pair[1])[0]]  # they share a cell
    sounds = events
    if rng.random() < 0.5 and pairs:
        sounds = [e for pair in pairs for e in pair]
    start_s = segment_of(rng.choice(sounds))[0]
    if rng.random() < 0.5:
        start_s = max(0.0, start_s - rng.uniform(0, 0.5))
    return start_s


def read_waves(described):
    """The waveforms of clips; none may end before its events do."""
    waves = []
    for path, events in tqdm(described, "reading clips"):
        waves.append(load_audio(path))
        if events[-1]["end_s"] > len(waves[-1]) / SAMPLE_RATE + 0.5:
            raise EchoError(f"{path}: the clip ends before its event at {events[-1]['start_s']} s")
    return waves


def train_encoder(detector, training, described, settings):
    """Each step: pieces at the full rate, of one length, and thumbnails of clips, as long as the
    shortest. Some clips are kept for grade()."""
    detector.train(not detector.encoder.pretrained)  # no dropout, but cuDNN's GRU asks for it
    waves = read_waves(described)
    shortest_s = min(map(len, waves)) / SAMPLE_RATE
    kept = min(50, len(waves) // 20)
    for step in training.steps(settings.encoder_steps, "encoder"):
        rng, metrics = np.random.default_rng([settings.seed, step]), {}
        start_s, end_s = segment_of(rng.choice(described[rng.integers(kept, len(waves))][1]))
        parts = {"segment_loss": (TOKENS_PER_SECOND, end_s - start_s, 24)}
        if settings.thumbnail:
            parts["first_loss"] = THUMBNAIL_RATE, shortest_s, 8
        for name, (rate, length_s, batch) in parts.items():
            n, pieces, labels = math.ceil(length_s * rate - 1e-6), [], []
            mine = range(batch)[training.rank::training.world]
            for k in mine:
                rng = np.random.default_rng([settings.seed, step, k])
                i, start_s = rng.integers(kept, len(waves)), 0.0
                if rate == TOKENS_PER_SECOND:
                    start_s = piece_start(described[i][1], rng)
                piece = cut(waves[i], start_s, start_s + length_s)
                pieces.append(F.pad(piece, (0, round(length_s * SAMPLE_RATE) - len(piece))))
                labels.append(detector.labels(described[i][1], start_s, n, rate))
            pieces, labels = (torch.stack(x).to(detector.names.device) for x in (pieces, labels))
            loss = detector(pieces, labels, rate == THUMBNAIL_RATE) * len(mine) / batch
            loss.backward()
            metrics[name] = sum_over_processes(loss.item())
        training.set_lr(6e-3 * linear_schedule(step, settings.encoder_steps))
        optimizer_step(training.optimizer)
        training.step += 1
        training.log(metrics, show=parts, every=25)
    clips = [(wave, events) for wave, (_, events) in zip(waves[:kept], described)]
    grades = detector.grade(clips, settings.thumbnail)
    training.log(grades, show=grades)
    if training.rank == 0 and kept and min(grades.values()) < 0.9:
        print("What the encoder can't tell apart no later stage can learn: delete "
              f"{training.folder} and try --encoder-steps {3 * settings.encoder_steps}")


def train_base(model, training, described, kinds, settings):
    """Half of the samples describe a whole clip, half answer a question about short clips. So no
    question about a whole clip is answered, and no answer points to a segment."""
    heard = features_of(model)
    mine = range(settings.base_batch)[training.rank::training.world]
    for step in training.steps(settings.base_steps, "base"):
        samples = []
        for i, k in zip(training.batch(len(described), settings.base_batch), mine):
            path, events = described[i]
            features = heard(path, tuple(segment_of(e) for e in events))
            rng = np.random.default_rng([settings.seed, step, k])
            sample = short_clips if rng.random() < 0.5 else whole_clip
            samples.append(sample(model, *features, exact(events), rng, kinds))
        update(model, training, samples, settings.base_lr, settings.base_steps)


def whole_clip(model, first_listen, segments, events, rng, kinds):
    """Describe two sounds, which may have to be searched, and what comes after each; or all kinds
    of sound, in RANDOM order: in order of time, the next place would be known without its name. In
    half of the descriptions each sound's short clip follows its place; in the others, which cost
    less, everything after a sound is told: where the next one is, is the hardest to learn (seed 0:
    right in 92% instead of 65%)."""
    ask, said, listen = [], [], rng.random() < 0.5
    if rng.random() < 0.5:
        found = [row for row in questions_about(events) if row["category"] == "find"]
        for row in (pick("find", events, rng), rng.choice(found)):  # pick: to be searched
            *looks, target = row["listen_to"]
            after = [target] if listen else events[events.index(target):]
            ask.append(f"the {row['name']} and what comes after it")
            said += [*look_for(looks), *map(point_to, after)]
    else:
        for kind in rng.permutation(sorted({e["kind"] for e in events})):
            ask.append(f"the {kind}")
            said += look_for([e for e in events if e["kind"] == kind])
    sample = model.prompt(first_listen, f"Describe {', '.join(ask)}.")
    pairs, rest = split_segments(" ".join(said))
    for before, tag in pairs:
        sample.add(model.tokenize(before + tag), trained=True)
        if listen:
            sample.add_audio(segments[tag])
    return model.add_response(sample, rest)


def short_clips(model, first_listen, segments, events, rng, kinds):
    """A question, most to find or order, without a whole clip and without places, and its chain,
    mostly with the short clips that it speaks of, at the full rate. Here counting is learned, and
    when to go on."""
    category = str(rng.choice(list(QUESTIONS), p=[0.1, 0.4, 0.1, 0.4]))
    row = write_row(category, events, rng, kinds)
    sample = model.prompt([], row["question"], row["multi_choice"])
    listen, (pairs, rest) = rng.random() < 0.75, split_segments(row["cot"])
    for before, tag in pairs:  # not listen: how an answer follows from a chain
        sample.add(model.tokenize(before.rstrip()), trained=True)
        if listen:
            sample.add_audio(segments[tag])
    return model.add_response(sample, rest)


def run_stage(stage, settings, device):
    """Train one stage, from the model of the one before, or from --model."""
    out = Path(settings.out)
    folder = out / stage
    before = {"base": out / "encoder", "sft": Path(settings.model or out / "base")}.get(stage)
    if stage == "sft":
        rows = read_questions(settings.data, settings.audio_root, ("answer", "cot"))
        inputs = {"data": [settings.data, *sorted({q.path for q in rows})]}
    else:
        described, kinds = read_clips(settings)
        inputs = {"clips": [settings.clips, *(path for path, _ in described)]}
    if before:
        inputs["model"] = [model_folder(before)]
    later = {"encoder": ("base_", "sft_", "projector_"), "base": ("sft_",), "sft": ()}[stage]
    wanted = stamp(settings, inputs, later)
    if is_finished(folder, wanted):
        return
    if stage == "encoder":
        torch.manual_seed(settings.seed)
        model = new_model(settings, described).to(device)
        detector = Detector(model, kinds).to(device)
        training = Training(folder, detector, settings, wanted)
        train_encoder(detector, training, described, settings)
        scaled = {k: detector.scale * v for k, v in detector.words.state_dict().items()}
        model.projector.load_state_dict(scaled)  # audio tokens look like words for what they hold
    else:
        model = load(before, device)
        model.bf16 = settings.bf16
        training = Training(folder, model, settings, wanted,
                            {"projector": settings.projector_rate},
                            muon=stage == "base" and model.config.decoder == "tiny")
        if stage == "base":
            train_base(model, training, described, kinds, settings)
        else:
            check_rows(rows)
            train_sft(model, training, rows, settings)
    training.finish(model)


def run():
    settings = parse_settings(Settings, __doc__)
    if settings.model and (settings.decoder, settings.encoder, settings.thumbnail) != (
            "tiny", "small", True):
        raise EchoError("--decoder, --encoder and --no-thumbnail are of the stages that --model "
                        "leaves out; give either")
    if (load(settings.model).config if settings.model else settings).decoder != "tiny":
        settings = parse_settings(Settings, __doc__, PRETRAINED)
    device = pick_device(train=True)
    if processes()[1] > min(8, settings.base_batch, settings.sft_batch):
        raise EchoError("more processes than rows of a batch (the encoder's: 8); start fewer")
    read_questions(settings.data, settings.audio_root, ("answer", "cot"))  # a mistake shows at once
    for stage in ("sft",) if settings.model else ("encoder", "base", "sft"):
        with lock(Path(settings.out) / stage):
            run_stage(stage, settings, device)


if __name__ == "__main__":
    main(run)
