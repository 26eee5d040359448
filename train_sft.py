"""Stage 1 of Echo, and before it a stand-in for the pretrained audio model that the paper starts from.

    python train_sft.py                     # all stages: 4 minutes on two CPU cores, 1.2 GB of memory
    python train_sft.py --stage sft --retrain

encoder    frame-level sound-event detector, from nothing; then frozen               runs/encoder
projector  a pretrained decoder only: the projector alone, decoder frozen            runs/projector
align      the decoder learns what is heard where: captions, then instructions,
           half of them with the audio of each segment inserted after its tag        runs/base
sft        the paper's stage 1: grounded chains, text only                           runs/sft

A stage that is finished is skipped; one that was killed goes on from its last save. Left out: packing of several
rows into one sequence, and mixing the stages.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from echo import (PAPER_PROMPT, Clips, Config, EchoError, Sample, Training, WhisperEncoder, build, cut, evaluate, finished,
                  fixed, linear_schedule, load, load_audio, main, parse_settings, pick_device, read_questions, read_rows, save)
from make_data import CATEGORIES, from_edge, look_for, then_comes, write_row

STAGES = ("encoder", "projector", "align", "sft")
FOLDERS = dict(zip(STAGES, ("encoder", "projector", "base", "sft")))


@dataclass
class Settings:
    data: str = "data/sft.jsonl"     # rows with chains (cot), for sft
    clips: str = "data/clips.jsonl"  # described clips (A1_description; A4_events for the toy), for encoder and align
    test: str = "data/test.jsonl"    # rows to evaluate the SFT policy on; "none": no evaluation
    audio_root: str | None = None    # audio paths are relative to this folder; none: to the data file's
    out: str = "runs"                # each stage writes a folder in it
    stage: str = "all"               # or one of encoder, projector, align, sft
    decoder: str = "tiny"            # or a Qwen2 checkpoint: a name or a local folder
    encoder: str = "small"           # or a Whisper checkpoint: a name or a local folder
    first_listen_rate: float | None = 2.0  # audio tokens a second in the first listen; none: the full rate (the paper)
    share_position: bool = True      # all tokens of a re-listened segment at one position
    train: str = "decoder"           # in align and sft: decoder (all of it), projector, or the last N layers: last-4
    encoder_steps: int = 300         # 98% of the frames are right by then
    encoder_clips: int = 600         # of 16 a step
    encoder_lr: float = 2e-3
    projector_steps: int = 1000      # only with a pretrained decoder
    align_steps: int = 3500          # captions at most; they end when a segment's start is known (align_until)
    align_until: float = 0.3         # running mean of the start digit's loss, in nats; not knowing is 1.8
    align_batch: int = 8
    align_lr: float = 1e-3           # constant, then over the instructions linear to 0
    instruct_steps: int = 1000
    sft_steps: int = 600             # nearly two epochs; the paper: one over 75.9k rows
    sft_batch: int = 16
    sft_lr: float = 7e-4             # the paper: 5e-6, for a model 10,000 times as large
    warmup: float = 0.05             # share of a stage's steps
    tokens_per_batch: int = 16384    # micro-batches hold at most so many tokens, gradients are accumulated over them
    checkpointing: bool = False      # gradient checkpointing: less memory, one more forward pass
    seed: int = 0                    # of the weights and of every draw
    device: str = "auto"             # cuda if there is one, else cpu
    log_every: int = 25              # steps
    save_every: int = 250            # steps
    retrain: bool = False            # train again what is already trained


# ---------------------------------------------------------------------------------------------- encoder

class Detector(nn.Module):
    """Frame-level sound-event detector: the encoder and linear heads for kind (or silence), start, and rhythm."""

    def __init__(self, encoder, clips):
        super().__init__()
        events = [e for _, clip in clips for e in clip["A4_events"]]
        self.kinds = sorted({e["kind"] for e in events})
        self.counts = sorted({e["pulses"] for e in events if "pulses" in e})
        self.encoder = encoder
        self.kind, self.start = nn.Linear(encoder.dim, len(self.kinds) + 1), nn.Linear(encoder.dim, 1)
        self.pulses = nn.Linear(encoder.dim, max(1, len(self.counts)))

    def forward(self, crops, thumbnails):
        """Logits (kind, start, pulses) at each token, of the crops at the full rate and of the thumbnails."""
        tokens = (torch.cat(self.encoder(crops, False)), torch.cat(self.encoder(thumbnails, True)))
        return [(self.kind(x), self.start(x)[:, 0], self.pulses(x)) for x in tokens]

    def labels(self, events, start_s, token_s, n, fine):
        """(n,) kind at each token (len(kinds): silence), (n,) does it start there, (n,) index of its number of pulses or -1.

        `fine`: the gaps between pulses are silence, and the number of pulses is asked for.
        """
        t = start_s + (torch.arange(-1, n) + 0.5) * token_s
        kind, pulses = torch.full((n + 1,), len(self.kinds)), torch.full((n + 1,), -1)
        for e in events:
            inside = (t > e["start_s"]) & (t < e["end_s"])
            if fine and "pulses" in e:
                pulses[inside] = self.counts.index(e["pulses"])
                inside &= from_edge(e["pulses"], (t - e["start_s"]) / (e["end_s"] - e["start_s"])) > 0
            kind[inside] = self.kinds.index(e["kind"])
        starts = (kind[1:] != kind[:-1]) & (kind[1:] != len(self.kinds))
        return kind[1:], starts.float(), pulses[1:]


def detection_loss(logits, labels):
    """Summed over the tokens: cross-entropy of kind, of starting or not, and of the number of pulses where there is one."""
    return (F.cross_entropy(logits[0], labels[0], reduction="sum")
            + F.binary_cross_entropy_with_logits(logits[1], labels[1], reduction="sum")
            + F.cross_entropy(logits[2], labels[2], reduction="sum", ignore_index=-1))


def train_encoder(training, detector, clips, settings):
    """Each step: 16 thumbnails of whole clips, and a random crop of each at the full rate."""
    config, encoder = detector.encoder.config, detector.encoder
    token_s = 1 / encoder.TOKENS_PER_SECOND
    thumb_s = 1 / (config.first_listen_rate or encoder.TOKENS_PER_SECOND)
    clips = [(load_audio(path, config.sample_rate), clip["A4_events"]) for path, clip in
             tqdm(clips[:settings.encoder_clips], desc="reading clips", disable=training.rank > 0)]
    device = training.parameters[0].device
    for step in tqdm(range(training.step, settings.encoder_steps), desc="encoder", initial=training.step,
                     total=settings.encoder_steps, disable=training.rank > 0):
        waves, crops, thumb_labels, crop_labels = [], [], [], []
        for k in range(16)[training.rank::training.world]:
            rng = np.random.default_rng([settings.seed, step, k])
            wave, events = clips[rng.integers(len(clips))]
            n_all = encoder.n_tokens(len(wave), False)
            n = min(int(rng.integers(8, 36)), n_all)
            start_s = int(rng.integers(n_all - n + 1)) * token_s
            waves.append(wave.to(device))
            crops.append(cut(wave, start_s, start_s + n * token_s, config.sample_rate).to(device))
            n = encoder.n_tokens(len(crops[-1]), False)
            crop_labels.append(detector.labels(events, start_s, token_s, n, True))
            thumb_labels.append(detector.labels(events, 0.0, thumb_s, encoder.n_tokens(len(wave), True), thumb_s == token_s))
        logits = training.ddp(crops, waves)
        labels = [[torch.cat(x).to(device) for x in zip(*each)] for each in (crop_labels, thumb_labels)]
        counts = training.sum(*(len(y[0]) for y in labels))
        loss = sum(detection_loss(x, y) / n for x, y, n in zip(logits, labels, counts))
        (loss * training.world).backward()
        training.update(settings.encoder_lr * linear_schedule(step, settings.encoder_steps, int(settings.warmup * settings.encoder_steps)))
        training.step += 1
        right = training.sum(loss.item(), *((x[0].argmax(1) == y[0]).sum() for x, y in zip(logits, labels)))
        if training.step % settings.log_every == 0:
            training.log(loss=right[0], frames_right=right[1] / counts[0], thumbnails_right=right[2] / counts[1])
        if training.step % settings.save_every == 0:
            training.save()


def probe(training, detector, clips):
    """What a small network reads of the number of pulses from a sound's tokens: of the first listen, and at the full rate."""
    encoder, config = detector.encoder, detector.encoder.config
    x, y = {"first_listen": [], "full_rate": []}, []
    if not config.first_listen_rate or not detector.counts or training.rank > 0:
        return
    for path, clip in tqdm(clips, desc="probe"):
        wave = load_audio(path, config.sample_rate).to(training.parameters[0].device)
        events = [e for e in clip["A4_events"] if "pulses" in e]
        with torch.no_grad():
            thumbnail = encoder([wave], True)[0]
            x["full_rate"] += [t.flatten() for t in encoder([cut(wave, e["start_s"], e["end_s"], config.sample_rate) for e in events], False)]
        x["first_listen"] += [cut(thumbnail, e["start_s"], e["end_s"], config.first_listen_rate).flatten() for e in events]
        y += [detector.counts.index(e["pulses"]) for e in events]
    y, n = torch.tensor(y, device=training.parameters[0].device), len(y) * 4 // 5
    right = {}
    for name, features in x.items():
        features = nn.utils.rnn.pad_sequence(features, batch_first=True)
        features = (features - features.mean(0)) / (features.std(0) + 1e-3)
        net = nn.Sequential(nn.Linear(features.shape[1], 128), nn.GELU(), nn.Linear(128, len(detector.counts))).to(y.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(300):
            i = torch.randint(n, (128,), device=y.device)
            F.cross_entropy(net(features[i]), y[i]).backward()
            optimizer.step()
            optimizer.zero_grad()
        right[f"probe_{name}"] = (net(features[n:]).argmax(1) == y[n:]).float().mean().item()
    training.log(**right, probe_chance=1 / len(detector.counts))


@torch.no_grad()
def name_projector(model, clips, detector):
    """Start the projector where each audio token looks like the embedding of its sound's name: least squares.

    Labels and embeddings are what the detector and the tiny decoder have in common before they have met.
    """
    table = model.decoder.get_input_embeddings().weight
    names = torch.stack([table[model.tokenizer(k, add_special_tokens=False).input_ids[-1]] for k in detector.kinds]
                        + [torch.zeros_like(table[0])])
    x, y = [], []
    for path, clip in tqdm(clips[:300], desc="projector"):
        wave = load_audio(path, model.config.sample_rate).to(model.device)
        for first_listen in (True, False):
            tokens = model.encoder([wave], first_listen)[0]
            seconds = len(wave) / model.config.sample_rate / len(tokens)
            x.append(tokens)
            y.append(names[detector.labels(clip["A4_events"], 0.0, seconds, len(tokens), not first_listen)[0]])
    x = torch.cat([torch.cat(x), torch.ones(sum(map(len, x)), 1, device=model.device)], 1)
    solution = torch.linalg.lstsq(x.double().cpu(), torch.cat(y).double().cpu()).solution.to(table)
    model.projector.weight.copy_(solution[:-1].T)
    model.projector.bias.copy_(solution[-1])


# ---------------------------------------------------------------------------------------------- text with audio

def add_grounded(model, sample, text, path, clips, listen, place=True):
    """Append a grounded text to learn; with `listen`, the audio of each segment after its tag, as decoding inserts it.

    place=False: the times in the tags are given, not to be learned.
    """
    *parts, last = text.split("</seg>")
    for part in parts:
        said, times = part.split("<seg>")
        model.add_text(model.add_text(sample, said + "<seg>", trained=True), times + "</seg>", trained=place)
        if listen:
            model.add_span(sample, clips.span(path, *map(float, times.split(","))))
    return model.add_response(sample, last)


def describe(model, clip, path, clips, rng, instruct):
    """A clip and a text that says what is heard where, to learn.

    Captions name every sound in RANDOM order: in order of time, where a sound is could be had without its name.
    Instructions name the sounds to describe, or one and what follows it; half of them with the segments' audio.
    """
    events = [clip["A4_events"][i] for i in rng.permutation(len(clip["A4_events"]))]
    ask, text = "Describe every sound.", " ".join(map(look_for, events))
    if instruct and rng.random() < 0.5:
        events = events[:int(rng.integers(1, len(events) + 1))]
        ask, text = f"Describe {', '.join('the ' + e['kind'] for e in events)}.", " ".join(map(look_for, events))
    elif instruct:
        i = int(rng.integers(len(events) - 1))
        first, after = clip["A4_events"][i:i + 2]
        ask, text = f"Describe the {first['kind']} and what comes right after it.", f"{look_for(first)} {then_comes(after)}"
    sample = model.add_text(model.add_span(Sample(), clips.span(path)), ask)
    return add_grounded(model, sample, text, path, clips, listen=instruct and rng.random() < 0.5)


def short_clips(model, clip, path, clips, rng):
    """A question, and short clips at the full rate with what is heard in them; the whole clip is not heard.

    Here counting is learned. Where the short clips lie is given: without the whole clip it can't be known.
    """
    row = write_row(str(rng.choice(CATEGORIES)), clip["A4_events"], rng)
    text = model.config.prompt.format(question=row["question"], choices=", ".join(row["multi_choice"]))
    return add_grounded(model, model.add_text(Sample(), text), row["cot"], path, clips, listen=True, place=False)


def align_sample(model, clip, path, clips, rng, instruct):
    if "A4_events" not in clip:  # clips with a description alone
        sample = model.add_text(model.add_span(Sample(), clips.span(path)), "Describe the audio.")
        return model.add_response(sample, clip["A1_description"])
    if instruct and rng.random() < 0.4:
        return short_clips(model, clip, path, clips, rng)
    return describe(model, clip, path, clips, rng, instruct)


def fit(training, model, draw, n_rows, batch, rate, settings, desc):
    """The one loop over text samples. draw(row index, rng) -> Sample; rate() -> learning rate, None at the end.

    Logs the mean loss of the trained tokens, and `start_loss`, that of the first digit after <seg>: is the place known?
    """
    bar = tqdm(initial=training.step, desc=desc, unit="step", disable=training.rank > 0)
    model.train()
    while (lr := rate()) is not None:
        rng = [np.random.default_rng([settings.seed, training.step, k]) for k in range(batch)[training.rank::training.world]]
        samples = [draw(i, r) for i, r in zip(training.batch(n_rows, batch, settings.seed), rng)]
        starts = torch.tensor([s.ids[t - 1] == model.seg_id for s in samples for t, trained in enumerate(s.trained) if trained])
        n_tokens, n_starts = training.sum(len(starts), starts.sum())
        seen = torch.zeros(2)

        def loss(here, logp, entropy):
            seen[:] += torch.stack([-logp.detach().sum(), -logp.detach()[starts[here].to(logp.device)].sum()]).cpu()
            return -logp.sum() / n_tokens
        training.backward(samples, loss, settings.tokens_per_batch)
        training.update(lr)
        training.step += 1
        total, start = training.sum(*seen)
        if n_starts:
            training.state["start_loss"] = 0.97 * training.state.get("start_loss", 3.0) + 0.03 * start / n_starts
        bar.update()
        if training.step % settings.log_every == 0:
            training.log(loss=total / n_tokens, start_loss=start / max(1, n_starts), lr=lr)
        if training.step % settings.save_every == 0:
            training.save()


def align_rate(training, settings):
    """Constant until places are known (or align_steps), then over the instructions linear to 0."""
    step, state = training.step, training.state
    if "instruct_at" not in state and (state.get("start_loss", 9.0) < settings.align_until or step >= settings.align_steps):
        state["instruct_at"] = step
    if "instruct_at" not in state:
        return settings.align_lr * min(1.0, (step + 1) / (settings.warmup * 1000 + 1))
    left = settings.instruct_steps - (step - state["instruct_at"])
    return settings.align_lr * left / settings.instruct_steps if left > 0 else None


def linear_rate(training, lr, steps, settings):
    return lr * linear_schedule(training.step, steps, int(settings.warmup * steps)) if training.step < steps else None


def set_trainable(model, what):
    """Freeze all but the projector and what --train names; the audio encoder is frozen outside its own training."""
    layers = model.decoder.model.layers
    n = int(what[5:]) if what.startswith("last-") and what[5:].isdigit() else None
    if what not in ("decoder", "projector") and not (n and n <= len(layers)):
        raise EchoError(f"--train {what}: must be decoder, projector, or last-N with N up to {len(layers)}")
    model.requires_grad_(False)
    for part in {"decoder": [model.decoder], "projector": []}.get(what, [*layers[len(layers) - (n or 0):], model.decoder.model.norm]):
        part.requires_grad_(True)
    model.projector.requires_grad_(True)
    model.stamp.requires_grad_(True)


# ---------------------------------------------------------------------------------------------- the stages

def run_stage(stage, settings, device, rank, world):
    folder = Path(settings.out) / FOLDERS[stage]
    later = tuple(f"{name}_" for name in STAGES[STAGES.index(stage) + 1:]) + (("instruct_",) if stage in STAGES[:2] else ())
    fixed_here = {k: v for k, v in fixed(settings).items() if not k.startswith(later) and (stage == "sft" or k not in ("data", "test"))}
    if finished(folder, fixed_here, settings.retrain, rank, world):
        return
    clip_rows = read_rows(settings.clips, ("audio_path",)) if stage != "sft" else []
    root = Path(settings.audio_root or Path(settings.clips).parent)
    clip_rows = [(root / c["audio_path"], c) for c in clip_rows]
    torch.manual_seed(settings.seed)
    if stage == "encoder":
        model = new_model(settings, clip_rows).to(device)
        if all("A4_events" in clip for _, clip in clip_rows):
            detector = Detector(model.encoder, clip_rows).to(device)
            if not isinstance(model.encoder, WhisperEncoder):
                training = Training(folder, detector, fixed_here, device, rank, world)
                train_encoder(training, detector, clip_rows, settings)
                training.save()
                probe(training, detector, clip_rows[:settings.encoder_clips])
            if settings.decoder == "tiny":
                name_projector(model, clip_rows, detector)
        elif not isinstance(model.encoder, WhisperEncoder):
            raise EchoError(f"{settings.clips}: rows without 'A4_events' can't train the small encoder; give --encoder a Whisper checkpoint")
    else:
        before = STAGES[STAGES.index(stage) - 1]
        if before == "projector" and not (Path(settings.out) / "projector").exists():
            before = "encoder"
        model = load(Path(settings.out) / FOLDERS[before], device)
        set_trainable(model, "projector" if stage == "projector" else settings.train)
        if settings.checkpointing:
            model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        training, clips = Training(folder, model, fixed_here, device, rank, world), Clips(model)
        train_text(stage, training, model, clip_rows, clips, settings)
        training.save()
    if rank == 0:
        save(model, folder / "model")
    if world > 1:
        torch.distributed.barrier()


def train_text(stage, training, model, clip_rows, clips, settings):
    """The stages that train on text with audio in it."""
    if stage == "sft":
        rows = read_questions(settings.data, settings.audio_root, needs=("answer", "cot"))

        def draw(i, rng):
            q = rows[i]
            span = clips.span(q.path)
            return model.add_response(model.prompt(span, q.question, q.choices), q.row["cot"])
        fit(training, model, draw, len(rows), settings.sft_batch,
            lambda: linear_rate(training, settings.sft_lr, settings.sft_steps, settings), settings, stage)
        if settings.test != "none":
            test = read_questions(settings.test, settings.audio_root)[:150]
            training.log(**evaluate(training, model, test, "text", 100))
        return

    def draw(i, rng):
        path, clip = clip_rows[i]
        return align_sample(model, clip, path, clips, rng, "instruct_at" in training.state)
    rate = (lambda: align_rate(training, settings)) if stage == "align" else (
        lambda: linear_rate(training, settings.align_lr, settings.projector_steps, settings))
    fit(training, model, draw, len(clip_rows), settings.align_batch, rate, settings, stage)


def new_model(settings, clip_rows):
    """Encoder and decoder as the flags say; the tiny decoder's tokenizer is trained on the data's own words."""
    config = Config(first_listen_rate=settings.first_listen_rate, share_position=settings.share_position,
                    encoder=settings.encoder, decoder=settings.decoder)
    if settings.decoder != "tiny":
        config.prompt = PAPER_PROMPT
        return build(config)
    rows = read_rows(settings.data, ("question", "cot"))
    texts = [row["question"] + " " + row["cot"] + " Choose from" for row in rows]
    texts += [f"Describe every sound. Describe the audio. Describe the {', '.join(e['kind'] for e in c.get('A4_events', ()))} and what comes"
              for _, c in clip_rows]
    return build(config, texts)


def run():
    settings = parse_settings(Settings, __doc__)
    if settings.stage != "all" and settings.stage not in STAGES:
        raise EchoError(f"--stage {settings.stage}: must be all or one of {', '.join(STAGES)}")
    device, rank, world = pick_device(settings.device)
    stages = STAGES if settings.decoder != "tiny" else tuple(s for s in STAGES if s != "projector")
    for stage in stages if settings.stage == "all" else (settings.stage,):
        run_stage(stage, settings, device, rank, world)


if __name__ == "__main__":
    main(run)
