"""Stage 1 of Echo, and before it a stand-in for the pretrained audio model that it starts from.

    python train_sft.py                     # all stages: 159 s on two CPU cores, at most 1.2 GB
    python train_sft.py --stage sft --retrain
    python train_sft.py --decoder DIR --out runs/qwen       # a pretrained Qwen2 as the decoder

encoder   sound-event detector, from nothing; then frozen for good                  runs/encoder
align     the decoder learns what is heard where: captions, then instructions,
          half of them with the audio of each segment inserted after its tag        runs/base
sft       the paper's stage 1: grounded chains, text only                           runs/sft

A stage that is finished is skipped; one that was killed goes on from its last save. Left out:
packing of several rows into one sequence, and mixing the stages.
"""
import dataclasses
from dataclasses import dataclass
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
                  parse_settings, pick_device, prepare, read_questions, read_rows, require,
                  split_segments)
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
    """One update: the mean of -log p over the trained tokens of all processes.

    `place_loss` is that of the first token of each time after <seg>: is the place known?
    """
    n_tokens = training.sum(sum(sum(s.trained) for s in samples))[0]
    total, place, n_places = 0.0, 0.0, 0
    for batch in micro_batches(samples, settings.tokens_per_batch):
        batch = [samples[i] for i in batch]
        logp = model(batch)
        (-logp.sum() / n_tokens).backward()
        is_place = torch.tensor([begins_a_place(model, s.ids, t) for s in batch
                                 for t, trained in enumerate(s.trained) if trained])
        logp = logp.detach().cpu()
        total, place = total - logp.sum().item(), place - logp[is_place].sum().item()
        n_places += is_place.sum().item()
    training.update(lr)
    training.step += 1
    if training.step % settings.log_every == 0:
        total, place, n_places = training.sum(total, place, n_places)
        training.log(("loss", "place_loss"), loss=total / n_tokens,
                     place_loss=place / max(1, n_places), lr=lr)


class Clips:
    """Features of audio files, each encoded once and by itself: a run that goes on after a kill
    sees the very same numbers. Kept up to `keep_bytes`."""

    def __init__(self, model, keep_bytes=2e9):
        self.model, self.kept, self.room = model, {}, keep_bytes

    def __call__(self, path, *segment):
        """The first listen of a clip, or a re-listened (start_s, end_s) of it: (n, encoder dim)."""
        if (path, segment) not in self.kept:
            rate = self.model.config.sample_rate
            wave = load_audio(path, rate)
            wave = cut(wave, *segment, rate) if segment else wave
            features = self.model.hear([wave], first_listen=not segment)[0]
            self.room -= features.nbytes
            if self.room < 0:
                return features
            self.kept[path, segment] = features
        return self.kept[path, segment]


def begins_a_place(model, ids, t):
    before, piece = (model.piece(i) if i >= 0 else "" for i in ids[t - 1:t + 1])
    return before.endswith(">") and piece.strip()[:1].isdigit()


# ==================================================================================================
# From here on: a stand-in for a pretrained audio model. With one of your own, skip it.

# ---------------------------------------------------------------------------------- tiny parts

def tiny_tokenizer(texts):
    """Byte-level BPE trained on the toy's texts: their words, tags and times become one token each,
    and any other text still works."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r" ?</?[a-z]+>| ?\d+\.\d| ?\w[\w-]*|[^\w\s]|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, show_progress=False, initial_alphabet=alphabet,
        special_tokens=["<|end|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>",
                                   clean_up_tokenization_spaces=False)


def tiny_decoder(config, vocab_size):
    """A Qwen2 decoder small enough to learn from nothing in minutes, thanks to one thing that any
    pretrained decoder has and this one starts with: an induction head (arXiv 2209.11895).

    Layer 0 copies each token's predecessor into a subspace of its own; layer 1 looks for tokens
    with the same predecessor and copies them. After "the hum <seg>" that is what stands after the
    audio token that sounds like a hum: its time.
    """
    decoder = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=config.dim, intermediate_size=2 * config.dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.heads, max_position_embeddings=32_768, initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))
    half = config.dim // config.heads // 2
    angle = 1e4 ** (-torch.arange(half) / half)         # RoPE's turn a position, one a pair of dims
    predecessor, induction = (layer.self_attn for layer in decoder.model.layers[:2])
    turn, first, second = (random_rotation(config.dim) for _ in range(3))
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


def random_rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim)).Q


def new_model(settings, clip_rows):
    """Encoder and decoder as the flags say; the tiny tokenizer is trained on the data's words."""
    config = Config(first_listen_rate=settings.first_listen_rate, encoder=settings.encoder,
                    share_position=settings.share_position, decoder=settings.decoder)
    if settings.decoder != "tiny":
        config.prompt, config.max_new_tokens = PAPER_PROMPT, 512
        return build(config)
    texts = []
    for q in read_questions(settings.data, settings.audio_root, needs=("answer", "cot")):
        texts += [f" {q.question} Choose from\n{q.row['cot']}", *q.choices]
        texts += [" " + choice for choice in q.choices]
    for _, clip in clip_rows:
        for event in clip.get("A4_events", ()):
            texts += [f" Describe every sound. {look_for(event)} Describe the audio and what comes"]
    texts += [f"{t / 10:.1f}" for t in range(300)] * 2
    tokenizer = tiny_tokenizer(texts)
    return build(config, tiny_decoder(config, len(tokenizer)), tokenizer)


PAPER_PROMPT = ("{question} Choose the answer from {choices}. Think step-by-step. Refer to the "
                "specific audio segments while thinking, and indicate the corresponding "
                "timestamps. Answer in the format of <think>...</think><answer>...</answer>.")


# ---------------------------------------------------------------------------------- encoder

class Detector(nn.Module):
    """Frame-level sound-event detector: the encoder, and linear heads for the kind of sound (or
    silence), for a start, and for the number of pulses."""

    def __init__(self, encoder, clips):
        super().__init__()
        events = [e for _, clip in clips for e in clip["A4_events"]]
        self.kinds = sorted({e["kind"] for e in events})
        self.counts = sorted({e["pulses"] for e in events})
        self.encoder = encoder
        self.kind = nn.Linear(encoder.dim, len(self.kinds) + 1)
        self.start = nn.Linear(encoder.dim, 1)
        self.pulses = nn.Linear(encoder.dim, max(1, len(self.counts)))

    def forward(self, waves, first_listen):
        """Logits of kind, start and pulses at each token of all waves: (n, .) each."""
        x = torch.cat(self.encoder(waves, first_listen))
        return self.kind(x), self.start(x)[:, 0], self.pulses(x)

    def labels(self, events, start_s, token_s, n, fine):
        """At each of n tokens: its kind (len(kinds): silence), does a sound start there, and the
        index of its number of pulses or -1: (n,) each. fine: gaps between pulses are silence, and
        the number is asked for."""
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


def train_encoder(training, detector, clips, settings):
    """Each step: 16 first listens of whole clips, and a random crop of each at the full rate."""
    encoder, config = detector.encoder, detector.encoder.config
    token_s = 1 / encoder.TOKENS_PER_SECOND
    first_s = 1 / (config.first_listen_rate or encoder.TOKENS_PER_SECOND)
    heard = []
    for path, clip in tqdm(clips[:settings.encoder_clips], desc="reading clips",
                           disable=training.rank > 0):
        heard.append((load_audio(path, config.sample_rate), clip["A4_events"]))
    for step in training.steps(settings.encoder_steps, "encoder", settings.save_every):
        waves, crops, first_labels, crop_labels = [], [], [], []
        for k in range(16)[training.rank::training.world]:
            rng = np.random.default_rng([settings.seed, step, k])
            wave, events = heard[rng.integers(len(heard))]
            n_all = int(len(wave) / config.sample_rate / token_s)
            n = min(int(rng.integers(8, 36)), n_all)
            start_s = int(rng.integers(n_all - n + 1)) * token_s
            crop = cut(wave, start_s, start_s + n * token_s, config.sample_rate)
            waves.append(wave.to(training.device))
            crops.append(crop.to(training.device))
            n_first = int(np.ceil(len(wave) / config.sample_rate / first_s))
            first_labels.append(detector.labels(events, 0.0, first_s, n_first, first_s == token_s))
            crop_labels.append(detector.labels(events, start_s, token_s, n, True))
        metrics = {}
        for name in ("frames", "first"):
            sounds, labels = (crops, crop_labels) if name == "frames" else (waves, first_labels)
            labels = [torch.cat(x).to(training.device) for x in zip(*labels)]
            n = training.sum(len(labels[0]))[0]
            logits = detector(sounds, first_listen=name == "first")
            loss = detection_loss(logits, labels) / n
            loss.backward()
            right = (logits[0].argmax(1) == labels[0]).sum() / n
            metrics[f"{name}_loss"], metrics[f"{name}_right"] = training.sum(loss.item(), right)
        warmup = int(settings.warmup * settings.encoder_steps)
        training.update(settings.encoder_lr * linear_schedule(step, settings.encoder_steps, warmup))
        training.step += 1
        if training.step % settings.log_every == 0:
            training.log(("frames_right", "first_right"), **metrics)


def detection_loss(logits, labels):
    """Summed cross-entropy of the kind, of starting or not, and of the number of pulses if any."""
    return (F.cross_entropy(logits[0], labels[0], reduction="sum")
            + F.binary_cross_entropy_with_logits(logits[1], labels[1], reduction="sum")
            + F.cross_entropy(logits[2], labels[2], reduction="sum", ignore_index=-1))


@torch.no_grad()
def start_projector(model, detector, clips):
    """Start the projector, by least squares, where an audio token looks like the words for what it
    holds: its sound's name, at the full rate plus the number of pulses; silence is zero."""
    table = model.decoder.get_input_embeddings().weight.float()
    words = [*detector.kinds, *(NUMBERS[k] for k in detector.counts)]
    vectors = torch.stack([table[model.ids(" " + word)].mean(0) for word in words] + [0 * table[0]])
    x, y = [], []
    for path, clip in tqdm(clips[:400], desc="projector"):
        wave = load_audio(path, model.config.sample_rate)
        for first_listen in (True, False):
            tokens = model.hear([wave], first_listen)[0]
            seconds = len(wave) / model.config.sample_rate / len(tokens)
            kind, _, pulses = detector.labels(clip["A4_events"], 0.0, seconds, len(tokens),
                                              not first_listen)
            kind[kind == len(detector.kinds)] = -1
            pulses[pulses >= 0] += len(detector.kinds)
            x.append(F.pad(tokens, (0, 1), value=1.0))
            y.append(vectors[kind] + vectors[pulses])
    solution = torch.linalg.lstsq(torch.cat(x).double().cpu(), torch.cat(y).double().cpu()).solution
    model.projector.weight.copy_(solution[:-1].T)
    model.projector.bias.copy_(solution[-1])


# ---------------------------------------------------------------------------------- alignment

def align(training, model, clip_rows, settings):
    """Captions until places are known, then instructions, with a learning rate that goes to 0."""
    clips, captions, instructions = Clips(model), settings.caption_steps, settings.instruct_steps
    kinds = sorted({e["kind"] for _, clip in clip_rows for e in clip.get("A4_events", ())})
    for step in training.steps(captions + instructions, "align", settings.save_every):
        samples = []
        share = range(settings.align_batch)[training.rank::training.world]
        for i, k in zip(training.batch(len(clip_rows), settings.align_batch, settings.seed), share):
            rng = np.random.default_rng([settings.seed, step, k])
            (path, clip), instruct = clip_rows[i], step >= captions
            events = clip.get("A4_events")
            if not events:  # a description alone
                sample = model.prompt(clips(path), "Describe the audio.")
                samples.append(model.add_response(sample, clip["A1_description"]))
            elif instruct and rng.random() < 0.4:
                samples.append(short_clips(model, events, path, clips, rng, kinds))
            else:
                samples.append(whole_clip(model, events, path, clips, rng, instruct))
        warm = (step + 1) / max(1, settings.warmup * (captions + instructions))
        left = (captions + instructions - step) / instructions
        fit(training, model, samples, settings.align_lr * min(1.0, warm, left), settings)


def whole_clip(model, events, path, clips, rng, instruct):
    """What is heard where, to learn.

    Captions name every sound in RANDOM order: in order of time, where a sound is could be had
    without its name. Instructions name the sounds to describe, or one and what follows it; half of
    them come with the segments' audio.
    """
    mixed = [events[i] for i in rng.permutation(len(events))]
    ask, text = "Describe every sound.", " ".join(map(look_for, mixed))
    if instruct and rng.random() < 0.5:
        mixed = mixed[:int(rng.integers(1, len(mixed) + 1))]
        ask = f"Describe {', '.join('the ' + e['kind'] for e in mixed)}."
        text = " ".join(map(look_for, mixed))
    elif instruct and len(events) > 1:
        i = int(rng.integers(len(events) - 1))
        ask = f"Describe the {events[i]['kind']} and what comes right after it."
        text = f"{look_for(events[i])} {then_comes(events[i + 1])}"
    sample = model.prompt(clips(path), ask)
    return add_grounded(model, sample, text, path, clips, listen=instruct and rng.random() < 0.5)


def short_clips(model, events, path, clips, rng, kinds):
    """A question, and short clips at the full rate with what is heard in them; no whole clip.

    Here counting is learned. Where the short clips lie is given: it can't be known.
    """
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

def run_stage(stage, settings, device):
    folder = Path(settings.out) / STAGES[stage]
    mine = stage_settings(stage, settings)
    if already_trained(folder, mine):
        return
    torch.manual_seed(settings.seed)
    clip_rows = read_clips(settings) if stage != "sft" else []
    if stage == "encoder":
        model = new_model(settings, clip_rows).to(device)
        training = make_encoder(folder, model, clip_rows, mine, settings)
    else:
        before = list(STAGES.values())[list(STAGES).index(stage) - 1]
        model = prepare(load(Path(settings.out) / before, device), settings)
        for name in ("decoder", "encoder", "first_listen_rate", "share_position"):
            was, now = getattr(model.config, name), getattr(settings, name)
            if was != now:
                raise EchoError(f"{settings.out}/{before} was made with {name} = {was}, now it is "
                                f"{now}; give the same value")
        training = Training(folder, model, mine, {"projector": settings.projector_rate})
        if stage == "align":
            align(training, model, clip_rows, settings)
        else:
            sft(training, model, settings)
    training.finish(model)


def read_clips(settings):
    """The described clips: [(path, row), ...], where events are known each as make_data.py's."""
    root, clips, kinds = Path(settings.audio_root or Path(settings.clips).parent), [], set()
    for number, clip in enumerate(read_rows(settings.clips, ("audio_path",)), 1):
        wrong, events = None, clip.get("A4_events")
        try:
            kinds |= {e["kind"] for e in events or ()}
            known = all(0 <= e["start_s"] < e["end_s"] and e["pulses"] in NUMBERS
                        for e in events or ())
        except (TypeError, KeyError):
            known = False
        if not known:
            wrong = "'A4_events' without kind, start_s, end_s and 2 to 6 pulses each"
        elif not events and not isinstance(clip.get("A1_description"), str):
            wrong = "neither 'A4_events' nor 'A1_description'"
        if wrong:
            raise EchoError(f"{settings.clips}, row {number}: {wrong}")
        clips.append((root / clip["audio_path"], clip))
    if 0 < len(kinds) < 5:
        raise EchoError(f"{settings.clips}: {len(kinds)} kinds of sound; questions about order "
                        "need five or more")
    return clips


def make_encoder(folder, model, clip_rows, mine, settings):
    """Train the small encoder; start the projector, whatever the encoder, if events are known."""
    small, known = settings.encoder == "small", all("A4_events" in clip for _, clip in clip_rows)
    if small and not known:
        raise EchoError(f"{settings.clips}: rows without 'A4_events' can't train the small "
                        "encoder; give --encoder a Whisper checkpoint")
    detector = Detector(model.encoder, clip_rows if known else []).to(model.device)
    training = Training(folder, detector, mine)
    if small:
        train_encoder(training, detector, clip_rows, settings)
    if known:
        start_projector(model, detector, clip_rows)
    return training


def stage_settings(stage, settings):
    """The settings that a stage depends on, which a run can't change on the way."""
    names = sorted(f.name for f in dataclasses.fields(settings))
    for later, prefixes in (("align", ("caption_", "instruct_", "align_", "train", "projector_")),
                            ("sft", ("sft_", "data", "test"))):
        if list(STAGES).index(later) > list(STAGES).index(stage):
            names = [n for n in names if not n.startswith(prefixes)]
    return {n: getattr(settings, n) for n in names}


def run():
    settings = parse_settings(Settings, __doc__)
    require(settings, stage=("all", *STAGES), dtype=DTYPES)
    frames = 100 / (settings.first_listen_rate or 25)  # of mel; a token is an average of them
    if frames < 4 or settings.encoder == "small" and abs(frames - round(frames)) > 1e-6:
        raise EchoError(f"--first-listen-rate {settings.first_listen_rate}: must divide 100 and be "
                        "at most 25; 0: all")
    device = pick_device(settings.device)
    follow_decoder(settings, settings.decoder)
    for stage in STAGES if settings.stage == "all" else (settings.stage,):
        run_stage(stage, settings, device)


if __name__ == "__main__":
    main(run)
