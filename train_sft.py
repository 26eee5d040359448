"""Stage 1 of Echo, and before it a stand-in for the pretrained audio model that it starts from.

    python train_sft.py                     # all stages: 3 to 5 minutes on two CPU cores, 1.2 GB
    python train_sft.py --stage sft --retrain
    python train_sft.py --decoder DIR --out runs/qwen       # a pretrained Qwen2 as the decoder

encoder   sound-event detector, from nothing; then frozen for good                  runs/encoder
align     the decoder learns what is heard where: captions, then instructions       runs/base
sft       the paper's stage 1: grounded chains, text only                           runs/sft

A stage that is finished is skipped; one that was killed goes on from its last save. Left out:
packing of several rows into one sequence, and mixing the stages.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from echo import (DTYPES, Config, EchoError, Training, already_trained, build, cut,
                  follow_decoder, linear_schedule, load, load_audio, main, micro_batches,
                  parse_settings, pick_device, prepare, processes, read_questions, read_rows,
                  require, split_segments)
from generate import evaluate
from make_data import CATEGORIES, NUMBERS, from_edge, look_for, then_comes, write_row

STAGES = {"encoder": "encoder", "align": "base", "sft": "sft"}  # and the folder each writes


@dataclass
class Settings:
    data: str = "data/sft.jsonl"     # rows with chains (cot), for sft
    clips: str = "data/clips.jsonl"  # described clips (A1_description; A4_events for the toy)
    test: str = "data/test.jsonl"    # rows to evaluate the SFT policy on; none: no evaluation
    audio_root: str = ""             # audio paths are relative to it, or to the data file's folder
    out: str = "runs"                # each stage writes a folder in it
    stage: str = "all"               # or encoder, align, sft
    decoder: str = "tiny"            # or a Qwen2 checkpoint: a name or a local folder
    encoder: str = "small"           # or a Whisper checkpoint: a name or a local folder
    first_listen_rate: float = 2.0   # audio tokens a second in the first listen; 0: the full rate
    share_position: bool = True      # all tokens of a re-listened segment at one position
    train: str = "decoder"           # in align and sft: decoder, projector, or last-N layers
    encoder_steps: int = 300         # of 16 clips; 96 to 98% of the frames are right by then
    encoder_clips: int = 600
    encoder_lr: float = 2e-3
    caption_steps: int = 200
    instruct_steps: int = 800
    align_batch: int = 8
    align_lr: float = 1e-3
    sft_steps: int = 600             # the paper: one epoch of 75.9k rows
    sft_batch: int = 16
    sft_lr: float = 7e-4             # the paper: 5e-6, for 7 billion parameters
    projector_rate: float = 1.0      # the projector's learning rate, as a factor
    warmup: float = 0.05             # share of a stage's steps, as in the paper
    tokens_per_batch: int = 16384    # a micro-batch; gradients are accumulated over them
    checkpointing: bool = False      # gradient checkpointing: less memory, one more forward pass
    dtype: str = "auto"              # fp32 or bf16; auto: bf16 for a pretrained decoder
    seed: int = 0                    # of the weights and of every draw
    device: str = "auto"             # cuda if there is one, else cpu
    log_every: int = 25              # steps
    save_every: int = 250            # steps
    retrain: bool = False            # train again what is already trained
    # with a pretrained decoder the defaults are, as measured for the README:
    PRETRAINED = dict(caption_steps=40, instruct_steps=130, align_lr=5e-5, sft_steps=20,
                      sft_batch=8, sft_lr=2e-5, projector_rate=0.2, tokens_per_batch=3000,
                      log_every=5, save_every=40)


# ---------------------------------------------------------------------------------- stage 1: SFT

def sft(training, model, settings):
    """The paper's stage 1: chains that point at segments, as text. No audio follows a tag here."""
    rows = read_questions(settings.data, settings.audio_root, needs=("answer", "cot"))
    clips, test = Clips(model), []
    if settings.test != "none":
        test = read_questions(settings.test, settings.audio_root)[:150]
    for step in training.steps(settings.sft_steps, "sft", settings.save_every):
        samples = []
        for i in training.batch(len(rows), settings.sft_batch, settings.seed):
            q = rows[i]
            sample = model.prompt(clips(q.path), q.question, q.choices)
            samples.append(model.add_response(sample, q.row["cot"]))
        warmup = int(settings.warmup * settings.sft_steps)
        lr = settings.sft_lr * linear_schedule(step, settings.sft_steps, warmup)
        fit(training, model, samples, lr, settings)
    if test:
        training.log(("eval_accuracy",), **evaluate(training, model, test, reasoning="text"))


def fit(training, model, samples, lr, settings):
    """One update: the mean of -log p over the trained tokens of all processes. `place_loss` is that
    of the first token of each time after <seg>: is the place known?"""
    n_tokens = training.sum(sum(sum(s.trained) for s in samples))[0]
    total, place, n_places = 0.0, 0.0, 0
    for batch in micro_batches(samples, settings.tokens_per_batch):
        batch = [samples[i] for i in batch]
        logp = model(batch)
        (-logp.sum() / n_tokens).backward()
        logp = logp.detach().cpu()
        places = logp[torch.tensor([b for s in batch for b in begin_places(model, s)])]
        total, place = total - logp.sum().item(), place - places.sum().item()
        n_places += len(places)
    training.update(lr)
    training.step += 1
    if training.step % settings.log_every == 0:
        total, place, n_places = training.sum(total, place, n_places)
        training.log(("loss", "place_loss"), loss=total / n_tokens,
                     place_loss=place / max(1, n_places), lr=lr)


def begin_places(model, sample):
    """Of each trained token: does it begin a time after a tag?"""
    pieces = [model.piece(i) if i >= 0 else "" for i in sample.ids]
    return [pieces[t - 1].endswith(">") and pieces[t].strip()[:1].isdigit()
            for t, trained in enumerate(sample.trained) if trained]


class Clips:
    """Features of audio files, kept up to `keep_bytes`. Each is encoded by itself: a run that goes
    on after a kill sees the very same numbers."""

    def __init__(self, model, keep_bytes=2e9):
        self.model, self.kept, self.room = model, {}, keep_bytes

    def __call__(self, path, *segment):
        """The first listen of a clip, or a re-listened (start_s, end_s) of it: (n, encoder dim)."""
        if (path, segment) in self.kept:
            return self.kept[path, segment]
        rate = self.model.config.sample_rate
        wave = load_audio(path, rate)
        wave = cut(wave, *segment, rate) if segment else wave
        if not len(wave):
            raise EchoError(f"{path}: the clip ends before its event at {segment[0]} s")
        features = self.model.hear([wave], first_listen=not segment)[0]
        if features.nbytes <= self.room:
            self.room -= features.nbytes
            self.kept[path, segment] = features
        return features


# ==================================================================================================
# From here on: a stand-in for a pretrained audio model. With one of your own, skip it.

def tiny_tokenizer(texts):
    """Byte-level BPE trained on the toy's texts: their words, tags and times become one token each,
    and any other text still works."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r" ?</?[a-z]+>| ?\d+\.\d| ?\w[\w-]*|[^\w\s]|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, show_progress=False, special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>",
                                   clean_up_tokenization_spaces=False)


def tiny_decoder(config, vocab_size):
    """A Qwen2 decoder that learns from nothing in minutes: it starts with an induction head, which
    any pretrained decoder has (arXiv 2209.11895). Layer 0 copies each token's predecessor into a
    subspace of its own; layer 1 looks for tokens with the same predecessor and copies them. After
    "the hum <seg>" that is what stands after the audio token that sounds like a hum: its time."""
    decoder = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=config.dim, intermediate_size=2 * config.dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.heads, max_position_embeddings=32_768, initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))
    half = config.dim // config.heads // 2
    angle = 1e4 ** (-torch.arange(half) / half)         # RoPE's turn a position, one a pair of dims
    predecessor, induction = (layer.self_attn for layer in decoder.model.layers[:2])
    turn, first, second = (torch.linalg.qr(torch.randn(config.dim, config.dim)).Q
                           for _ in range(3))
    with torch.no_grad():
        for layer in decoder.model.layers:
            layer.mlp.down_proj.weight *= 0.25
        for layer in decoder.model.layers[2:]:
            layer.self_attn.o_proj.weight *= 0.25
        # layer 0: constant q and k, k turned by one position, match best one position back
        for projection, shift in ((predecessor.q_proj, 0), (predecessor.k_proj, 1)):
            projection.weight *= 0.1
            bias = projection.bias.view(config.heads, 2, half)
            bias[:, 0, :3] = 7.0 * torch.cos(shift * angle[:3])
            bias[:, 1, :3] = 7.0 * torch.sin(shift * angle[:3])
        predecessor.v_proj.weight.copy_(first)
        predecessor.o_proj.weight.copy_(0.08 * turn @ first.T)
        # layer 1: q = k on that subspace, in the dims that RoPE hardly turns over a clip's length
        slow = (angle < 0.015).repeat(2 * config.heads)[:, None]
        for projection in (induction.q_proj, induction.k_proj):
            projection.weight *= 0.1
            projection.weight += 2.4 * slow * second @ turn.T
        induction.v_proj.weight.copy_(first)
        induction.o_proj.weight.copy_(0.08 * first.T)
    return decoder


def new_model(settings, described):
    """Encoder and decoder as the flags say; the tiny tokenizer is trained on the data's words."""
    config = Config(first_listen_rate=settings.first_listen_rate, encoder=settings.encoder,
                    share_position=settings.share_position, decoder=settings.decoder)
    if settings.decoder != "tiny":
        config.max_new_tokens = 512
        config.prompt = (  # the paper's
            "{question} Choose the answer from {choices}. Think step-by-step. Refer to the "
            "specific audio segments while thinking, and indicate the corresponding "
            "timestamps. Answer in the format of <think>...</think><answer>...</answer>.")
        if processes()[0] == 0:
            print(config)
        return build(config)
    texts = []
    for q in read_questions(settings.data, settings.audio_root, needs=("answer", "cot")):
        texts += [f" {q.question} Choose from\n{q.row['cot']}", *q.choices]
        texts += [" " + choice for choice in q.choices]
    for _, events, _ in described:
        for event in events or ():
            texts += [f" Describe every sound. {look_for(event)} Describe the audio and what comes"]
    texts += [f"{t / 10:.1f}" for t in range(300)] * 2
    tokenizer = tiny_tokenizer(texts)
    return build(config, tiny_decoder(config, len(tokenizer)), tokenizer)


# ---------------------------------------------------------------------------------- encoder

class Detector(nn.Module):
    """Frame-level sound-event detector: the encoder, and linear heads for the kind of sound (or
    silence), for a start, and for the number of pulses."""

    def __init__(self, encoder, described):
        super().__init__()
        self.kinds, self.counts = values("kind", described), values("pulses", described)
        self.encoder = encoder
        self.kind = nn.Linear(encoder.dim, len(self.kinds) + 1)
        self.start = nn.Linear(encoder.dim, 1)
        self.pulses = nn.Linear(encoder.dim, max(1, len(self.counts)))

    def labels(self, events, start_s, token_s, n, fine):
        """At each of n tokens: its kind (the last: silence), does a sound start, the index of its
        number of pulses or -1: (n,) each. fine: pulses count, and gaps between them are silence."""
        t = start_s + (torch.arange(-1, n) + 0.5) * token_s
        kind, pulses = torch.full((n + 1,), len(self.kinds)), torch.full((n + 1,), -1)
        for e in events:
            inside = (t > e["start_s"]) & (t < e["end_s"])
            if fine:
                pulses[inside] = self.counts.index(e["pulses"])
                share = (t - e["start_s"]) / (e["end_s"] - e["start_s"])
                inside &= from_edge(e["pulses"], share) > 0
            kind[inside] = self.kinds.index(e["kind"])
        starts = (kind[1:] != kind[:-1]) & (kind[1:] != len(self.kinds))
        return kind[1:], starts.float(), pulses[1:]

    def forward(self, waves, labels, first_listen):
        """The summed cross-entropy of the labels of all waves, and how many kinds are right."""
        x = torch.cat(self.encoder(waves, first_listen))
        kind, starts, pulses = (torch.cat(part).to(x.device) for part in zip(*labels))
        logits = self.kind(x)
        loss = (F.cross_entropy(logits, kind, reduction="sum")
                + F.binary_cross_entropy_with_logits(self.start(x)[:, 0], starts, reduction="sum")
                + F.cross_entropy(self.pulses(x), pulses, reduction="sum", ignore_index=-1))
        return loss, (logits.argmax(1) == kind).sum()


def values(key, described):
    """What the events of all clips have under a key."""
    return sorted({e[key] for _, events, _ in described for e in events or ()})


def train_encoder(training, detector, described, settings):
    """Each step: 16 first listens of whole clips, and a random crop of each at the full rate."""
    rate, token_s = detector.encoder.config.sample_rate, 1 / detector.encoder.TOKENS_PER_SECOND
    first_s = 1 / (settings.first_listen_rate or detector.encoder.TOKENS_PER_SECOND)
    heard, quiet = [], training.rank > 0
    for path, events, _ in tqdm(described[:settings.encoder_clips], "reading clips", disable=quiet):
        heard.append((load_audio(path, rate).to(training.device), events))
    for step in training.steps(settings.encoder_steps, "encoder", settings.save_every):
        whole, crops = [], []  # (wave, labels) of each
        for k in range(16)[training.rank::training.world]:
            rng = np.random.default_rng([settings.seed, step, k])
            wave, events = heard[rng.integers(len(heard))]
            n_all = int(len(wave) / rate / token_s)
            n = min(int(rng.integers(8, 36)), n_all)
            start_s = int(rng.integers(n_all - n + 1)) * token_s
            crop = cut(wave, start_s, start_s + n * token_s, rate)
            crops.append((crop, detector.labels(events, start_s, token_s, n, fine=True)))
            n, fine = int(np.ceil(len(wave) / rate / first_s - 1e-6)), first_s == token_s
            whole.append((wave, detector.labels(events, 0.0, first_s, n, fine)))
        metrics = {}
        for name, sounds in (("frames", crops), ("first", whole)):
            waves, labels = zip(*sounds)
            n = training.sum(sum(len(kind) for kind, _, _ in labels))[0]
            loss, right = detector(waves, labels, first_listen=name == "first")
            loss = loss / n
            loss.backward()
            metrics[f"{name}_loss"], metrics[f"{name}_right"] = training.sum(loss.item(), right / n)
        warmup = int(settings.warmup * settings.encoder_steps)
        training.update(settings.encoder_lr * linear_schedule(step, settings.encoder_steps, warmup))
        training.step += 1
        if training.step % settings.log_every == 0:
            training.log(("frames_right", "first_right"), **metrics)


@torch.no_grad()
def start_projector(model, detector, described):
    """Start the projector, by least squares, where an audio token looks like the words for what it
    holds: its sound's name, at the full rate plus the number of pulses; silence is zero."""
    table = model.decoder.get_input_embeddings().weight.float()
    words, silence = [*detector.kinds, *(NUMBERS[k] for k in detector.counts)], len(detector.kinds)
    vectors = [table[model.ids(" " + word)].mean(0) for word in words]
    vectors.insert(silence, 0 * table[0])
    vectors = torch.stack(vectors)
    x, y = [], []
    for path, events, _ in tqdm(described[:400], "projector", disable=processes()[0] > 0):
        wave = load_audio(path, model.config.sample_rate)
        for first_listen in (True, False):
            tokens = model.hear([wave], first_listen)[0]
            token_s = len(wave) / model.config.sample_rate / len(tokens)
            fine = not (first_listen and model.config.first_listen_rate)
            kind, _, pulses = detector.labels(events, 0.0, token_s, len(tokens), fine)
            x.append(F.pad(tokens, (0, 1), value=1.0))
            y.append(vectors[kind] + vectors[silence + 1 + pulses])
    solution = torch.linalg.lstsq(torch.cat(x).double().cpu(), torch.cat(y).double().cpu()).solution
    model.projector.weight.copy_(solution[:-1].T)
    model.projector.bias.copy_(solution[-1])


# ---------------------------------------------------------------------------------- alignment

def align(training, model, settings):
    """Captions until places are known, then instructions, with a learning rate that goes to 0."""
    clips, described = Clips(model), read_clips(settings)
    kinds = values("kind", described)
    captions, instructions = settings.caption_steps, settings.instruct_steps
    mine = range(settings.align_batch)[training.rank::training.world]
    for step in training.steps(captions + instructions, "align", settings.save_every):
        samples, instruct = [], step >= captions
        rows = training.batch(len(described), settings.align_batch, settings.seed)
        for i, k in zip(rows, mine):
            path, events, description = described[i]
            rng = np.random.default_rng([settings.seed, step, k])
            if not events:
                sample = model.prompt(clips(path), "Describe the audio.")
                sample = model.add_response(sample, description)
            elif instruct and rng.random() < 0.4:
                sample = short_clips(model, events, path, clips, rng, kinds)
            else:
                sample = whole_clip(model, events, path, clips, rng, instruct)
            samples.append(sample)
        warm = (step + 1) / max(1, settings.warmup * (captions + instructions))
        left = (captions + instructions - step) / instructions
        fit(training, model, samples, settings.align_lr * min(1.0, warm, left), settings)


def whole_clip(model, events, path, clips, rng, instruct):
    """Captions name every sound in RANDOM order: in order of time, where a sound is could be had
    without its name. Instructions name the sounds to describe, or one and what follows it; half of
    them come with the segments' audio."""
    mixed = [events[i] for i in rng.permutation(len(events))]
    ask, said = "Describe every sound.", [look_for(e) for e in mixed]
    if instruct and rng.random() < 0.5:
        n = int(rng.integers(1, len(mixed) + 1))
        ask = f"Describe {', '.join('the ' + e['kind'] for e in mixed[:n])}."
        said = said[:n]
    elif instruct and len(events) > 1:
        i = int(rng.integers(len(events) - 1))
        ask = f"Describe the {events[i]['kind']} and what comes right after it."
        said = [look_for(events[i]), then_comes(events[i + 1])]
    sample = model.prompt(clips(path), ask)
    listen = instruct and rng.random() < 0.5
    return add_grounded(model, sample, " ".join(said), path, clips, listen)


def short_clips(model, events, path, clips, rng, kinds):
    """A question, and short clips at the full rate with what is heard in them; no whole clip. Here
    counting is learned. Where the short clips lie is given: it can't be known."""
    category = str(rng.choice(CATEGORIES))
    row = write_row(category if len(events) > 1 else "count", events, rng, kinds)
    sample = model.prompt(None, row["question"], row["multi_choice"])
    return add_grounded(model, sample, row["cot"], path, clips, listen=True, place=False)


def add_grounded(model, sample, text, path, clips, listen, place=True):
    """Append a grounded text to learn; with `listen`, the audio of each segment after its tag, as
    decoding inserts it. place=False: the times in the tags are given, not to be learned."""
    pairs, rest = split_segments(text)
    for said, times in pairs:
        sample.add(model.ids(f"{said}<seg>"), trained=True)
        sample.add(model.ids(f"{times}</seg>"), trained=place)
        if listen:
            start_s, end_s = map(float, times.split(","))
            sample.add_audio(clips(path, start_s, end_s), model.config.share_position)
    return model.add_response(sample, rest)


# ---------------------------------------------------------------------------------- the stages

def read_clips(settings):
    """The described clips: [(path, events or None, description), ...], events as make_data.py's."""
    root, described = Path(settings.audio_root or Path(settings.clips).parent), []
    for number, row in enumerate(read_rows(settings.clips, ("audio_path",)), 1):
        events, description = row.get("A4_events"), row.get("A1_description")
        try:
            events = events and sorted(events, key=lambda e: e["start_s"])
            good = all(isinstance(e["kind"], str) and e["pulses"] in NUMBERS and 0 <= e["start_s"]
                       <= e["end_s"] - Config.min_segment_s + 1e-6 for e in events or ())
        except (TypeError, KeyError):
            good = False
        if not good or not events and not isinstance(description, str):
            raise EchoError(f"{settings.clips}, row {number}: 'A4_events' without kind, start_s, "
                            "end_s 0.2 s later and 2 to 6 pulses each, or neither these nor "
                            "'A1_description'")
        described.append((root / row["audio_path"], events, description))
    if 0 < len(values("kind", described)) < 5:
        raise EchoError(f"{settings.clips}: {len(values('kind', described))} kinds of sound; "
                        "questions about order need five or more")
    return described


def stage_settings(stage, settings):
    """The settings that a stage depends on: all but those of later stages. --data is one of these,
    though the tiny tokenizer is made of its words: it spells any other text, too."""
    of_sft = ("sft_", "data", "test")
    of_align = ("caption_", "instruct_", "align_", "train", "projector_")
    later = {"encoder": of_align + of_sft, "align": of_sft, "sft": ()}[stage]
    return {k: v for k, v in asdict(settings).items() if not k.startswith(later)}


def run_stage(stage, settings, device):
    folder, mine = Path(settings.out) / STAGES[stage], stage_settings(stage, settings)
    if already_trained(folder, mine):
        return
    torch.manual_seed(settings.seed)
    if stage == "encoder":
        described, small = read_clips(settings), settings.encoder == "small"
        known = all(events is not None for _, events, _ in described)
        if small and not known:
            raise EchoError(f"{settings.clips}: rows without 'A4_events' can't train the small "
                            "encoder; give --encoder a Whisper checkpoint")
        model = new_model(settings, described).to(device)
        detector = Detector(model.encoder, described).to(device)
        training = Training(folder, detector, mine)
        if small:
            train_encoder(training, detector, described, settings)
        if known:
            start_projector(model, detector, described)
    else:
        before = Path(settings.out) / ("encoder" if stage == "align" else "base")
        model = prepare(load(before, device), settings)
        for name in ("decoder", "encoder", "first_listen_rate", "share_position"):
            was, now = getattr(model.config, name), getattr(settings, name)
            if was != now:
                raise EchoError(f"{before} was made with {name} = {was}, now it is {now}; give "
                                "the same value")
        training = Training(folder, model, mine, {"projector": settings.projector_rate})
        if stage == "align":
            align(training, model, settings)
        else:
            sft(training, model, settings)
    training.finish(model)


def run():
    settings = parse_settings(Settings, __doc__)
    require(settings, stage=("all", *STAGES), dtype=DTYPES)
    rate, small = settings.first_listen_rate, settings.encoder == "small"
    whole_frames = rate and abs(100 / rate - round(100 / rate)) < 1e-6  # of mel, in an average
    if rate > 10 or rate and small and not whole_frames:
        raise EchoError(f"--first-listen-rate {rate}: must divide 100 and be at most 10; 0: the "
                        "full rate")
    if settings.warmup > 1:
        raise EchoError(f"--warmup {settings.warmup}: a share of the steps, at most 1")
    device = pick_device(settings.device)
    follow_decoder(settings, settings.decoder)
    for stage in STAGES if settings.stage == "all" else (settings.stage,):
        run_stage(stage, settings, device)


if __name__ == "__main__":
    main(run)
