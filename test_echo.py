"""pytest -q: each test compares with a trusted reference, a plain loop, or a hand-computed value."""
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import echo
import generate
import make_data
import train_rl
import train_sft
from echo import (Config, Echo, EchoError, Rollout, Sample, Segment, Span, build, grpo_loss, group_advantages, load,
                  load_audio, parse_segment, rollouts, save)

HERE = Path(__file__).parent
MICRO = dict(dim=48, layers=2, heads=4, encoder_dim=32, encoder_layers=1, encoder_heads=2)


def script(*args, check=True, env=None, **kwargs):
    """Run a script of the project as a user does."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **kwargs)
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A micro data folder: 24 training clips, 6 test clips."""
    folder = tmp_path_factory.mktemp("world")
    script("make_data.py", "--out", folder / "data", "--train-clips", 24, "--test-clips", 6)
    return folder


@pytest.fixture(scope="session")
def model(world):
    torch.manual_seed(0)
    rows = echo.read_rows(world / "data/sft.jsonl")
    return build(Config(**MICRO), [r["question"] + " " + r["cot"] + " Choose from" for r in rows] * 3).eval()


def noise(seconds, seed=0):
    return torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)) * 0.1


# ---------------------------------------------------------------------------------------------- audio

@pytest.mark.parametrize("bits,coding", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3)])
@pytest.mark.parametrize("channels,rate", [(1, 16_000), (2, 44_100), (3, 8_000)])
def test_wav_formats(tmp_path, bits, coding, channels, rate):
    t = np.arange(rate) / rate
    wave = np.stack([0.5 * np.sin(2 * np.pi * 440 * t) * (c + 1) / channels for c in range(channels)], 1)
    if coding == 3:
        raw = wave.astype("<f4").tobytes()
    elif bits == 8:
        raw = (wave * 127 + 128).round().astype(np.uint8).tobytes()
    else:
        ints = (wave * (2 ** (bits - 1) - 1)).round().astype("<i4")
        raw = ints.view(np.uint8).reshape(-1, 4)[:, :bits // 8].tobytes()
    block = channels * bits // 8
    (tmp_path / "a.wav").write_bytes(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(raw), b"WAVE", b"fmt ", 16, coding,
                                                 channels, rate, rate * block, block, bits, b"data", len(raw)) + raw)
    heard, got_rate = echo.read_wav(tmp_path / "a.wav")
    assert heard.shape == (channels, rate) and got_rate == rate
    assert np.abs(heard.numpy().T - wave).max() < (0.02 if bits == 8 else 1e-3)
    mono = load_audio(tmp_path / "a.wav")
    t = torch.arange(16_000) / 16_000
    want = 0.5 * torch.sin(2 * torch.pi * 440 * t) * (channels + 1) / (2 * channels)
    assert abs(len(mono) - 16_000) <= 1
    assert (mono[800:15_000] - want[800:15_000]).abs().max() < 0.02


@pytest.mark.parametrize("name,content,says", [
    ("none.wav", None, "no such file"),
    ("song.mp3", b"ID3\x03" + b"\0" * 100, "not a WAV file; convert it first: ffmpeg -i song.mp3"),
    ("cut.wav", struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 136, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 100) + b"\0" * 50, "50 of 100 bytes"),
    ("head.wav", b"RIFF\x10\0\0\0WAVEjunk\0\0\0\0", "'fmt ' or 'data' chunk is missing"),
    ("empty.wav", struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 0), "empty"),
    ("mulaw.wav", struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 40, b"WAVE", b"fmt ", 16, 7, 1, 8000, 8000, 1, 8, b"data", 4) + b"\0" * 4, "coding 7"),
])
def test_broken_audio_is_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EchoError, match=".") as error:
        load_audio(tmp_path / name)
    assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- encoder and model

@pytest.mark.parametrize("rate", [2.0, None])
@pytest.mark.parametrize("first_listen", [True, False])
def test_encoder_batch_equals_one_by_one(rate, first_listen):
    torch.manual_seed(0)
    encoder = echo.SmallEncoder(Config(**MICRO, first_listen_rate=rate)).eval()
    waves = [noise(s, i) for i, s in enumerate((6.0, 0.2, 1.03, 2.5))]
    with torch.no_grad():
        together = encoder(waves, first_listen)
        for wave, tokens in zip(waves, together):
            alone = encoder([wave], first_listen)[0]
            assert len(tokens) == encoder.n_tokens(len(wave), first_listen) == len(alone)
            assert (tokens - alone).abs().max() < 1e-4


def test_first_listen_lacks_the_detail_and_has_the_place(model):
    """Two clips that differ in the number of pulses alone: the thumbnails agree, the full rate doesn't."""
    t = np.arange(16_000) / 16_000
    clips = []
    for n in (2, 6):
        wave = torch.randn(96_000, generator=torch.Generator().manual_seed(1)).numpy() * 1e-3
        wave[32_000:48_000] += 0.1 * np.sin(2 * np.pi * 900 * t) * make_data.pulse_train(n, 16_000)
        clips.append(torch.tensor(wave, dtype=torch.float32))
    mel = [model.encoder.power(c) for c in clips]
    thumbs = [torch.nn.functional.avg_pool1d(m, 50).clamp_min(1e-6).log10() for m in mel]
    full = [m.clamp_min(1e-6).log10() for m in mel]
    assert (thumbs[0] - thumbs[1]).abs().mean() < 0.02 * (full[0] - full[1]).abs().max()
    assert (thumbs[0] - thumbs[1])[:, 4:6].abs().max() < 0.25 * (full[0] - full[1]).abs().max()
    assert thumbs[0][:, 4:6].max() > thumbs[0][:, :4].max() + 1.0


def dialogue(model, seed=0, seconds=3.0):
    """A prompt, some text, a re-listened segment, more text and eos."""
    wave = noise(seconds, seed)
    sample = model.prompt(wave, "How many pulses has the hum?", ["two", "three"])
    model.add_text(sample, "<think>I look for the hum <seg>0.5, 1.5</seg>", trained=True)
    model.add_span(sample, Span(wave[8000:24_000 + 800 * seed], 0.5))
    return model.add_response(sample, " the hum has two pulses.</think><answer>two</answer>")


def test_batch_equals_one_by_one(model):
    samples = [dialogue(model, i, 2.0 + i) for i in range(3)]
    with torch.no_grad():
        together = model(samples)[0].split([sum(s.trained) for s in samples])
        for sample, logp in zip(samples, together):
            assert (model([sample])[0] - logp).abs().max() < 1e-4


@pytest.mark.parametrize("share", [True, False])
def test_positions(model, share):
    model = copy.copy(model)
    model.config = Config(**MICRO, share_position=share)
    sample = dialogue(model)
    _, position, _, _ = model.collate([sample])
    (first_at, first), (at, span) = sample.spans
    n = model.encoder.n_tokens(first.n_samples, True)
    assert position[0, first_at:first_at + n].tolist() == list(range(first_at, first_at + n))
    n = model.encoder.n_tokens(span.n_samples, False)
    if share:
        assert position[0, at:at + n + 1].tolist() == [at] * n + [at + 1]
    else:
        assert position[0, at:at + n + 1].tolist() == list(range(at, at + n + 1))


def test_reserved_audio_token_in_text(model):
    with pytest.raises(EchoError, match="reserved"):
        model.prompt(noise(1.0), "what is <|audio|> here?", [])


def test_any_text_survives_the_tokenizer(model):
    for text in ("Ünïcode ✓ 1.5s, 2:03 <b>&amp;</b>", "the hum has two pulses.", "<seg>1.0, 2.5</seg> the hum"):
        assert model.tokenizer.decode(model.tokenizer(text, add_special_tokens=False).input_ids).strip() == text


# ---------------------------------------------------------------------------------------------- tags

@pytest.mark.parametrize("text,want", [
    ("2.0, 3.0", (2.0, 3.0, None)), ("2,3", (2, 3, None)), (" 2.5s , 3 s ", (2.5, 3, None)), (".5, 1.", (0.5, 1, None)),
    ("0:02, 0:03.5", (2, 3.5, None)), ("2.0, 2.2", (2.0, 2.2, None)), ("0, 6.0", (0, 6, None)),
    ("3, 2", (3, 2, "reversed")), ("2.0, 2.1", (2.0, 2.1, "too short")), ("2, 2", (2, 2, "too short")),
    ("5.0, 6.1", (5.0, 6.1, "outside the clip")), ("7, 8", (7, 8, "outside the clip")), ("1:00, 1:02", (60, 62, "outside the clip")),
    ("1.2.3, 4", (None, None, "malformed")), ("-1, 2", (None, None, "malformed")), ("1", (None, None, "malformed")),
    ("1, 2, 3", (None, None, "malformed")), ("", (None, None, "malformed")), ("a, b", (None, None, "malformed")),
    ("1e3, 2e3", (None, None, "malformed")), ("nan, inf", (None, None, "malformed")), ("0:75, 2:00", (None, None, "malformed")),
    ("٣, ٤", (None, None, "malformed"))])
def test_segment_tags(text, want):
    got = parse_segment(text, 6.0)
    assert (got.start_s, got.end_s, got.reason) == want


def test_turn_limit():
    assert parse_segment("1, 2", 6.0, turns=7).reason is None
    assert parse_segment("1, 2", 6.0, turns=8).reason == "too many turns"


def test_ten_thousand_hostile_tags():
    rng = random.Random(0)
    alphabet = ["0", "1", "9", ".", ",", " ", ":", "s", "-", "e", "<seg>", "</seg>", "\n", "\0", "²", "∞", "9" * 400, "1, 2", "1, 1.1", "٣"]
    reasons = set()
    for _ in range(10_000):
        segment = parse_segment("".join(rng.choice(alphabet) for _ in range(rng.randrange(9))), 6.0, rng.randrange(10))
        reasons.add(segment.reason)
        if segment.reason is None:
            assert 0 <= segment.start_s < segment.end_s <= 6.0 + 1e-6 and segment.end_s - segment.start_s >= 0.2 - 1e-6
    assert reasons == {None, "malformed", "reversed", "too short", "outside the clip", "too many turns"}


# ---------------------------------------------------------------------------------------------- decoding

class Scripted:
    """Makes a model write given texts, one for each row, by replacing what is sampled; everything else is the model's own."""

    def __init__(self, monkeypatch, model, texts):
        self.ids = [model.tokenizer(t, add_special_tokens=False).input_ids + [model.tokenizer.eos_token_id] for t in texts]
        def sample_tokens(model, hidden, rows, running, draws, temperature):
            logp = model.log_softmax(hidden, temperature or 1.0)
            for k, i in enumerate(running):
                token = self.ids[i][len(rows[i].logprobs)]
                yield token, logp[k, token].item(), logp[k, token].exp().item()
        monkeypatch.setattr(echo, "sample_tokens", sample_tokens)


TEXTS = ["<think>look <seg>0.5, 1.5</seg> the hum. Then <seg>1.0, 2.0</seg> the bell.</think><answer>hum</answer>",
         "<think>look <seg>9, 10</seg> a <seg>1, 0</seg> b <seg>x</seg> c</think><answer>two</answer>",
         "<answer>two</answer>",
         "<think><seg>0, 1</seg><seg>1, 2</seg> both</think><answer>bell</answer>"]


def test_interleaved_rollout_hears_the_right_part_and_matches_training(model, monkeypatch):
    """Batched, cached, waiting rows: the recorded log-probs are those of a plain uncached pass over the same ids."""
    Scripted(monkeypatch, model, TEXTS)
    waves = [noise(3.0 + i, i) for i in range(4)]
    prompts = [model.prompt(w, "Which sound comes right after the hum?" + " What?" * i, ["hum", "bell"]) for i, w in enumerate(waves)]
    heard = []
    real = echo.Span.__post_init__
    monkeypatch.setattr(echo.Span, "__post_init__", lambda self: (heard.append((self.start_s, self.wave)), real(self))[1])
    rows = rollouts(model, prompts, waves, temperature=0.7, max_new_tokens=200)
    assert [r.text for r in rows] == TEXTS
    assert [[(s.heard, s.reason) for s in r.segments] for r in rows] == [
        [(True, None)] * 2, [(False, "outside the clip"), (False, "reversed"), (False, "malformed")], [], [(True, None)] * 2]
    want = [(0.5, waves[0][8000:24_000]), (1.0, waves[0][16_000:32_000]), (0.0, waves[3][:16_000]), (1.0, waves[3][16_000:32_000])]
    for start_s, piece in want:
        assert any(s == start_s and len(w) == len(piece) and torch.equal(w, piece) for s, w in heard)
    assert len(heard) == len(want)
    for r in rows:  # log-probs at sampling = log-probs in training, one by one and uncached
        assert r.ended == "eos" and sum(r.sample.trained) == len(r.logprobs)
        with torch.no_grad():
            assert (model([r.sample], temperature=0.7)[0] - torch.tensor(r.logprobs)).abs().max() < 1e-4
    with torch.no_grad():  # and batched
        assert (model([r.sample for r in rows], 0.7)[0] - torch.tensor([x for r in rows for x in r.logprobs])).abs().max() < 1e-4


def test_inserted_audio_changes_what_follows_and_controls_differ(model, monkeypatch):
    Scripted(monkeypatch, model, TEXTS[:1])
    wave = noise(3.0)
    after = {}
    for insert in ("segment", "random", "silence"):
        row = rollouts(model, [model.prompt(wave, "q", [])], [wave], insert=insert)[0]
        at = row.sample.ids[row.n_prompt:].index(model.seg_end_id)
        assert row.sample.ids[row.n_prompt + at + 1:][:25] == [model.audio_id] * 25
        after[insert] = tuple(row.logprobs[at + 1:at + 4])
    text = rollouts(model, [model.prompt(wave, "q", [])], [wave], reasoning="text")[0]
    assert model.audio_id not in text.sample.ids[text.n_prompt:] and not text.heard
    after["text"] = tuple(text.logprobs[at + 1:at + 4])
    assert len(set(after.values())) == 4


def test_sampled_rollouts_do_not_depend_on_their_batch(model):
    waves = [noise(2.0 + i, i) for i in range(3)]
    prompts = [model.prompt(w, "How many pulses?" + " now?" * i, ["two"]) for i, w in enumerate(waves)]
    together = rollouts(model, prompts, waves, group=2, seeds=range(6), max_new_tokens=30)
    for i, row in enumerate(together):
        alone = rollouts(model, prompts[i // 2:i // 2 + 1], waves[i // 2:i // 2 + 1], seeds=[i], max_new_tokens=30)[0]
        assert alone.sample.ids == row.sample.ids and alone.ended == row.ended
        assert max(abs(a - b) for a, b in zip(alone.logprobs, row.logprobs)) < 1e-4
    assert together[0].sample.ids != together[1].sample.ids


def test_greedy_equals_transformers_generate(model):
    """Text-only greedy decoding against transformers' own generate from the same embeddings."""
    wave = noise(2.0)
    prompt = model.prompt(wave, "How many pulses has the hum?", ["two", "three"])
    ours = rollouts(model, [prompt], [wave], reasoning="text", temperature=0.0, max_new_tokens=20)[0]
    ids, position, mask, spans = model.collate([prompt])
    theirs = model.decoder.generate(inputs_embeds=model.embed(ids, spans), attention_mask=mask, do_sample=False, max_new_tokens=20,
                                    suppress_tokens=[model.audio_id], eos_token_id=list(model.eos_ids), pad_token_id=0)[0].tolist()
    assert ours.sample.ids[ours.n_prompt:] == theirs


def test_sampling_follows_the_probabilities(model):
    """Inverse CDF with 4,000 draws against the softmax itself; the audio placeholder never comes."""
    wave = noise(1.0)
    prompt = model.prompt(wave, "q", [])
    draws = rollouts(model, [prompt], [wave], group=4000, max_new_tokens=1, temperature=1.0)
    counts = np.bincount([r.sample.ids[-1] for r in draws], minlength=len(model.tokenizer)) / 4000
    ids, position, mask, spans = model.collate([prompt])
    with torch.no_grad():
        p = model.log_softmax(model.hidden(ids, position, mask, spans)[:, -1]).exp()[0].numpy()
    assert counts[model.audio_id] == p[model.audio_id] == 0
    assert np.abs(counts[:len(p)] - p[:len(counts)]).max() < 5 * math.sqrt(p.max() / 4000)
    assert draws[0].ended == "length" or draws[0].sample.ids[-1] in model.eos_ids


# ---------------------------------------------------------------------------------------------- rewards and GRPO

GOOD = "<think>a <seg>1, 2</seg> the hum.</think><answer>hum</answer>"


@pytest.mark.parametrize("text,heard,parts", [
    (GOOD, 1, (0.5, 0, 0.5, 0.5)),
    (GOOD, 0, (0.5, 0, 0.5, 0)),
    (GOOD.replace("hum</answer>", "bell</answer>"), 1, (0.5, 0, 0, 0)),
    (GOOD.replace("</seg> the", "</seg> The"), 1, (0.5, -0.1, 0.5, 0.5)),       # a space does not hide a capital
    (GOOD.replace("</seg> the", "</seg>The"), 1, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> the hum.", "</seg>"), 1, (0.5, -0.1, 0.5, 0.5)),      # nothing said: a tag follows
    ("<think>a <seg>1, 2</seg><seg>2, 3</seg> the hum</think><answer>hum</answer>", 2, (0.5, -0.1, 0.5, 0.5)),
    ("<think>a <seg>1, 2</seg> <seg>2, 3</seg> Hm</think><answer>hum</answer>", 2, (0.5, -0.2, 0.5, 0.5)),
    ("<think>" + "<seg>1, 2</seg>" * 7 + "</think><answer>hum</answer>", 7, (0.5, -0.5, 0.5, 0.5)),
    ("a <seg>1, 2</seg>", 1, (0, -0.1, 0, 0)),
    ("<think>a</think><answer>Hum.</answer>", 0, (0.5, 0, 0.5, 0)),
    ("<think>a</think> hum", 0, (0, 0, 0, 0)),
    ("<think>a</think><answer>hum</answer><answer>bell</answer>", 0, (0, 0, 0, 0)),
    ("<answer>hum</answer><think>a</think>", 0, (0, 0, 0.5, 0)),
    ("<think>a<think>b</think><answer>hum</answer>", 0, (0, 0, 0.5, 0)),
    ("", 0, (0, 0, 0, 0)),
])
def test_rewards_by_hand(text, heard, parts):
    row = Rollout(Sample(), None, 0, segments=[Segment("1, 2", 1, 2, heard=True)] * heard, text=text, confidence=0.8)
    got = echo.paper_reward(row, "hum")
    assert tuple(got.values()) == pytest.approx(parts) and list(got) == ["format", "consistency", "accuracy", "segment"]
    got, right = echo.confidence_reward(row, "hum"), parts[2] > 0
    want = 0.5 * (1 - 0.2 ** 2) if right else -0.5 * 0.8 ** 2
    assert got["accuracy"] == pytest.approx(want) and got["segment"] == pytest.approx(want if parts[3] else 0)


def test_your_own_reward(monkeypatch):
    """The README's fork: one function, one entry."""
    monkeypatch.setitem(echo.REWARDS, "short", lambda rollout, answer: {"short": -0.01 * len(rollout.logprobs), **echo.paper_reward(rollout, answer)})
    got = echo.REWARDS["short"](Rollout(Sample(), None, 0, logprobs=[0.0] * 10, text=GOOD), "hum")
    assert got["short"] == pytest.approx(-0.1) and got["accuracy"] == 0.5


def test_advantages_and_flat_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.5, 0.5, 0.5, 0.5]])
    got = group_advantages(rewards)
    assert got[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3) and got[1].tolist() == [0] * 4
    assert got[2].tolist() == pytest.approx([1.732, -0.577, -0.577, -0.577], abs=1e-2)


def test_grpo_loss_against_a_plain_double_loop():
    rng = np.random.default_rng(0)
    lengths, clip, beta = [3, 5, 1], 0.2, 0.04
    logp, old, ref = (rng.normal(-2, 0.5, sum(lengths)) for _ in range(3))
    adv = [1.3, -0.7, 0.2]
    want, at = 0.0, 0
    for n, a in zip(lengths, adv):  # mean over responses of the mean over tokens
        total = 0.0
        for t in range(at, at + n):
            ratio = math.exp(logp[t] - old[t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            k3 = math.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            total += -min(ratio * a, clipped * a) + beta * k3
        want, at = want + total / n / len(lengths), at + n
    samples = [Sample(ids=[0] * n, trained=[True] * n) for n in lengths]
    weights = echo.response_weights(samples, len(samples))
    advantage = torch.tensor(adv).repeat_interleave(torch.tensor(lengths))
    each, k3, clipped = grpo_loss(*(torch.tensor(x) for x in (logp, old, ref)), advantage, clip, beta)
    assert (weights * each).sum().item() == pytest.approx(want, abs=1e-6)
    assert (k3 >= 0).all() and set(clipped.tolist()) <= {0.0, 1.0}


def test_no_gradient_at_audio_and_some_at_eos(model):
    """The trained positions are the sampled ids: audio out, eos in."""
    sample = dialogue(model)
    trained = {t for t, on in enumerate(sample.trained) if on}
    audio = {t for t, i in enumerate(sample.ids) if i == model.audio_id}
    assert not trained & audio and len(sample.ids) - 1 in trained and sample.ids[-1] in model.eos_ids
    ids, position, mask, spans = model.collate([sample])
    hidden = model.hidden(ids, position, mask, spans).detach().requires_grad_()
    model.hidden = lambda *a: hidden
    try:
        (-model([sample])[0].mean()).backward()
    finally:
        del model.hidden
    touched = {t + 1 for t in range(len(sample.ids)) if hidden.grad[0, t].abs().sum() > 0}  # position t predicts t + 1
    assert touched == trained


def test_log_probs_in_chunks_and_checkpointing(model):
    samples = [dialogue(model, i) for i in range(24)]  # more than 512 trained tokens
    plain = copy.deepcopy(model)
    logits_free, _ = plain(samples)
    assert len(logits_free) > 512
    logits_free.mean().backward()
    reference = copy.deepcopy(model)
    parts = torch.cat([reference([s])[0] for s in samples])
    parts.mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), reference.named_parameters()):
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-5, name


def test_micro_batches_cover_everything_within_budget():
    lengths = [3, 9, 2, 30, 5, 5, 5]
    batches = echo.micro_batches(lengths, 20)
    assert sum(batches, []) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)


def test_listening_statistics_by_hand():
    heard = lambda *spans: [Segment("", a, b, heard=True) for a, b in spans]
    rows = [Rollout(Sample(), None, 0, logprobs=[0.0] * 10, text=GOOD, ended="eos", segments=heard((0, 2), (1, 3)) + [Segment("x", reason="malformed")]),
            Rollout(Sample(), None, 0, logprobs=[0.0] * 20, text="", ended="length", segments=heard((0, 1)))]
    got = echo.listening(rows)
    assert got["segments"] == 1.5 and got["segment_s"] == pytest.approx(5 / 3) and got["overlap"] == pytest.approx(1 / 5)
    assert (got["listened_once"], got["listened_twice"], got["length"], got["truncated"], got["no_answer"]) == (1, 0.5, 15, 0.5, 0.5)
    assert got["rejected"] == {"malformed": 0.25}


# ---------------------------------------------------------------------------------------------- data

def test_judge_catches_every_planted_fault():
    seen = set()
    for i in range(60):
        rng = np.random.default_rng([3, i])
        _, events = make_data.synthesise(rng)
        for category in make_data.CATEGORIES:
            row = make_data.write_row(category, events, rng)
            assert make_data.judge_qa(row, events) is None and make_data.judge_cot(row, events) is None
            assert row["answer"] in row["multi_choice"] and len(set(row["multi_choice"])) == 4
            for name, plant in make_data.QA_FAULTS.items():
                assert make_data.judge_qa(row | plant(row, events, rng), events), (name, row)
                seen.add(name)
            for name, plant in make_data.COT_FAULTS.items():
                bad = row | plant(row, events, rng)
                assert make_data.judge_qa(bad, events) is None and make_data.judge_cot(bad, events), (name, bad)
                seen.add(name)
    assert len(seen) >= 10


def test_same_seed_same_bytes_and_no_shared_clips(world, tmp_path):
    script("make_data.py", "--out", tmp_path / "again", "--train-clips", 24, "--test-clips", 6)
    files = sorted(p.relative_to(world / "data") for p in (world / "data").rglob("*") if p.is_file())
    assert len(files) == 35
    for f in files:
        assert (world / "data" / f).read_bytes() == (tmp_path / "again" / f).read_bytes()
    script("make_data.py", "--out", tmp_path / "other", "--train-clips", 2, "--test-clips", 2, "--seed", 1)
    assert (world / "data/audio/train/00000.wav").read_bytes() != (tmp_path / "other/audio/train/00000.wav").read_bytes()
    train = {p.read_bytes() for p in (world / "data/audio/train").iterdir()}
    assert not train & {p.read_bytes() for p in (world / "data/audio/test").iterdir()}
    sft, rl = (echo.read_rows(world / f"data/{name}.jsonl") for name in ("sft", "rl"))
    assert set(rl[0]) == {"id", "audio_path", "question", "multi_choice", "answer"} and set(sft[0]) == set(rl[0]) | {"cot"}


@pytest.mark.parametrize("content,says", [
    ('{"question": "q"}\n', "row 1: no 'answer'"),
    ('{"question": "q", "answer": "a"}\n', "row 1: no 'audio_path'"),
    ('{"question": "q", "answer": "a", "audio_path": "x.wav"}\n', "row 1: no 'multi_choice'"),
    ('{"question": "q", "answer": "a", "audio_path": "x.wav", "multi_choice": ["a"]}\n{"question": \n', "row 2: not JSON"),
    ('[{"question": "q"', "line 1: not JSON"), ("", "no rows"), ("[1]", "row 1")])
def test_broken_rows_are_one_line(tmp_path, content, says):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(EchoError) as error:
        echo.read_questions(tmp_path / "rows.jsonl")
    assert says in str(error.value) and "rows.jsonl" in str(error.value)


# ---------------------------------------------------------------------------------------------- checkpoints

def test_save_and_load_round_trip(model, tmp_path):
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again([dialogue(again)])[0], model([dialogue(model)])[0])
    text = "<think>I look for the hum <seg>1.0, 2.0</seg> the"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    save(model, tmp_path / "model")  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_folder_that_is_no_checkpoint(model, tmp_path):
    with pytest.raises(EchoError, match="no Echo checkpoint"):
        load(tmp_path)
    save(model, tmp_path / "model")
    (tmp_path / "model/echo.safetensors").write_bytes(b"half")
    with pytest.raises(EchoError, match="broken checkpoint"):
        load(tmp_path / "model")


# ---------------------------------------------------------------------------------------------- the scripts, end to end

TINY = ["--encoder-steps", 4, "--encoder-clips", 8, "--align-steps", 4, "--align-batch", 2, "--instruct-steps", 4, "--sft-steps", 4,
        "--sft-batch", 2, "--log-every", 1, "--device", "cpu"]
RL = ["--steps", 3, "--questions", 2, "--group", 2, "--max-new-tokens", 12, "--eval-questions", 4, "--eval-every", 2, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(world):
    """All stages at micro size, by the scripts."""
    data, out = world / "data", world / "runs"
    common = ["--data", data / "sft.jsonl", "--clips", data / "clips.jsonl", "--test", data / "test.jsonl", "--out", out]
    script("train_sft.py", *common, *TINY)
    script("train_rl.py", "--model", out / "sft", "--data", data / "rl.jsonl", "--test", data / "test.jsonl", "--out", out / "rl", *RL)
    return world


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_scripts(trained):
    log = [e for e in log_of(trained / "runs/rl") if "reward" in e]
    assert [e["step"] for e in log] == [1, 2, 3]
    for entry in log:
        assert {"reward", "format", "consistency", "accuracy", "segment", "flat_groups", "kl", "clip_share", "entropy", "length",
                "truncated", "segments", "segment_s", "overlap", "rejected", "tokens_per_s", "responses_per_s"} <= set(entry)
        assert entry["reward"] == pytest.approx(sum(entry[k] for k in ("format", "consistency", "accuracy", "segment")), abs=1e-4)
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float))
    assert any("eval_accuracy" in e for e in log_of(trained / "runs/rl"))
    before = (trained / "runs/sft/model/echo.safetensors").stat().st_mtime_ns
    done = script("train_sft.py", "--data", trained / "data/sft.jsonl", "--clips", trained / "data/clips.jsonl", "--test",
                  trained / "data/test.jsonl", "--out", trained / "runs", *TINY)
    assert done.stdout.count("already trained") == 3
    assert (trained / "runs/sft/model/echo.safetensors").stat().st_mtime_ns == before


def test_encoder_stays_frozen_after_its_own_stage(trained):
    stages = [echo.load_file(trained / f"runs/{s}/model/echo.safetensors") for s in ("encoder", "base", "sft", "rl")]
    for name, weight in stages[0].items():
        if name.startswith("encoder."):
            assert all(torch.equal(weight, s[name]) for s in stages[1:]), name
    assert not torch.equal(stages[0]["projector.weight"], stages[3]["projector.weight"])


def test_generate_on_a_foreign_clip(trained, tmp_path):
    """Another rate, stereo: an answer in JSON, and the stream."""
    t = np.arange(3 * 44_100) / 44_100
    wave = np.stack([np.sin(2 * np.pi * 300 * t), np.sin(2 * np.pi * 500 * t)], 1)
    raw = (wave * 8000).astype("<i2").tobytes()
    (tmp_path / "my clip.wav").write_bytes(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(raw), b"WAVE", b"fmt ", 16, 1, 2, 44_100,
                                                       176_400, 4, 16, b"data", len(raw)) + raw)
    ask = ["generate.py", tmp_path / "my clip.wav", "Which sound comes right after the hum?", "--choices", "bell", "hiss", "--model", trained / "runs/rl"]
    got = json.loads(script(*ask, "--json").stdout)
    assert set(got) == {"answer", "response", "segments", "ended"} and got["ended"] in ("eos", "length")
    assert "answer:" in script(*ask).stdout


def test_benchmark_files(trained, tmp_path):
    """MMAR and MMAU rows come back whole with the evaluators' keys; broken audio is named, counted, and the exit code is 1."""
    rows = echo.read_rows(trained / "data/test.jsonl")[:5]
    mmar = [{"id": i, "audio_path": "./" + r["audio_path"], "question": r["question"], "choices": r["multi_choice"], "answer": r["answer"],
             "modality": "sound", "category": "x", "sub-category": "y", "language": "en"} for i, r in enumerate(rows)]
    mmar[2]["audio_path"] = "audio/gone.wav"
    (tmp_path / "mmar.json").write_text(json.dumps(mmar))
    run = ["generate.py", "--benchmark", tmp_path / "mmar.json", "--audio-root", trained / "data", "--output", tmp_path / "out.json",
           "--model", trained / "runs/rl", "--batch", 2]
    done = script(*run, check=False)
    assert done.returncode == 1 and "1 of 5 rows" in done.stderr and "gone.wav" in done.stderr + done.stdout
    out = json.loads((tmp_path / "out.json").read_text())
    assert [{k: v for k, v in o.items() if k in m} for o, m in zip(out, mmar)] == mmar
    assert all(isinstance(o["answer_prediction"], str) and o["answer_prediction"] == o["model_output"] for o in out)
    assert out[2]["answer_prediction"] == "" and not (tmp_path / "out.json.part").exists()
    mmau = [{"id": str(i), "audio_id": r["audio_path"], "question": r["question"], "choices": r["multi_choice"], "answer": r["answer"],
             "task": "sound", "difficulty": "hard"} for i, r in enumerate(rows)]
    (tmp_path / "mmau.json").write_text(json.dumps(mmau))
    # an interrupted run: two rows done, the third half-written
    script("generate.py", "--benchmark", tmp_path / "mmau.json", "--audio-root", trained / "data", "--output", tmp_path / "whole.json", "--model", trained / "runs/rl")
    whole = json.loads((tmp_path / "whole.json").read_text())
    settings = generate.Settings(benchmark=str(tmp_path / "mmau.json"), model=str(trained / "runs/rl"), output=str(tmp_path / "again.json"))
    header = {k: str(getattr(settings, k)) for k in ("benchmark", "model", "reasoning", "insert", "temperature", "seed", "limit")}
    marked = [w | {"mark": 1} for w in whole[:2]]
    (tmp_path / "again.json.part").write_text("".join(json.dumps(x) + "\n" for x in [header, *marked]) + '{"id": "2", "audio')
    script("generate.py", "--benchmark", tmp_path / "mmau.json", "--audio-root", trained / "data", "--output", tmp_path / "again.json", "--model", trained / "runs/rl")
    again = json.loads((tmp_path / "again.json").read_text())
    assert [r["id"] for r in again] == [r["id"] for r in whole] and [r.get("mark") for r in again] == [1, 1, None, None, None]


@pytest.mark.parametrize("args,says", [
    (["generate.py", "nowhere.wav", "q?"], "nowhere.wav: no such file"),
    (["generate.py", "--model", "nowhere"], "no Echo checkpoint"),
    (["train_rl.py", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["train_rl.py", "--reward", "nothing"], "--reward nothing: must be one of"),
    (["train_rl.py", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["train_sft.py", "--stage", "third"], "--stage third: must be"),
    (["train_sft.py", "--train", "all", "--stage", "align"], "--train all: must be"),
    (["train_sft.py", "--decoder", "nowhere/qwen"], "neither a folder here nor reachable"),
    (["train_sft.py", "--device", "cuda:9"], "--device cuda:9"),
    (["make_data.py", "--qa-faults", "2"], "--qa_faults and --cot_faults"),
    (["generate.py", "--report", "nowhere"], "no log.jsonl")])
def test_a_users_mistake_is_one_line(trained, tmp_path, args, says, monkeypatch):
    """The flags that the mistake is not about are good ones. Some run as processes, the others, to save time, in this one."""
    good = {"train_rl.py": {"--model": trained / "runs/sft", "--data": trained / "data/rl.jsonl", "--out": tmp_path / "rl"},
            "train_sft.py": {"--data": trained / "data/sft.jsonl", "--clips": trained / "data/clips.jsonl", "--out": tmp_path / "runs"},
            "generate.py": {"--model": trained / "runs/rl"}, "make_data.py": {"--out": tmp_path / "data"}}[args[0]]
    if "align" in args:
        good["--out"] = trained / "runs-copy"
        subprocess.run(["cp", "-r", str(trained / "runs"), str(good["--out"])], check=True)
        subprocess.run(["rm", "-rf", str(good["--out"] / "base")], check=True)
    args = [*args, *(str(x) for flag, value in good.items() if flag not in args for x in (flag, value))]
    if not {"nowhere.wav", "--decoder", "--steps"} & set(args):
        monkeypatch.chdir(HERE)
        monkeypatch.setattr(sys, "argv", args)
        with pytest.raises(EchoError) as error:
            {"train_rl.py": train_rl, "train_sft.py": train_sft, "generate.py": generate, "make_data.py": make_data}[args[0]].run()
        assert says in str(error.value) and "\n" not in str(error.value)
        return
    done = script(*args, check=False, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")


# ---------------------------------------------------------------------------------------------- kills and several processes

def test_killed_and_run_again_ends_with_the_same_weights(trained, tmp_path):
    """SIGKILL in the middle of RL and of SFT; the same command goes on and ends where the uninterrupted run ended."""
    for name, command, folder, whole in (
            ("train_rl.py", ["--model", trained / "runs/sft", "--data", trained / "data/rl.jsonl", "--test", "none", "--save-every", 2, "--out", "{}", *RL[:-4], "--steps", 8], "", "rl"),
            ("train_sft.py", ["--data", trained / "data/sft.jsonl", "--clips", trained / "data/clips.jsonl", "--test", "none", "--stage", "sft", "--save-every", 2,
                              "--out", "{}", *TINY, "--sft-steps", 20], "sft", "sft")):
        outs = [tmp_path / f"{whole}-{i}" for i in range(2)]
        for out in outs:
            out.mkdir()
            subprocess.run(["cp", "-r", str(trained / "runs/base"), str(out / "base")], check=True)
        args = lambda out: [name, *[out if x == "{}" else x for x in command]]
        script(*args(outs[0]))
        process = subprocess.Popen([sys.executable, *map(str, args(outs[1]))], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        saves = outs[1] / folder / "saves"
        while not (saves.is_dir() and any(p.name.startswith("step-") and not p.suffix for p in saves.iterdir())):
            assert process.poll() is None or any(saves.iterdir())
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (saves / "step-999999.tmp").mkdir()  # what a kill in the middle of a save leaves
        script(*args(outs[1]))
        final = [{**echo.load_file(out / folder / "model/echo.safetensors"), **echo.load_file(out / folder / "model/model.safetensors")} for out in outs]
        assert all(torch.equal(v, final[1][k]) for k, v in final[0].items())
        steps = [[e["step"] for e in log_of(out / folder) if "loss" in e] for out in outs]
        assert steps[0] == steps[1]
        assert len([p for p in saves.iterdir() if not p.suffix]) == 2


def test_other_settings_do_not_go_on_with_a_run(trained, tmp_path):
    done = script("train_rl.py", "--model", trained / "runs/sft", "--data", trained / "data/rl.jsonl", "--test", trained / "data/test.jsonl", "--out", trained / "runs/rl",
                  *RL, "--lr", "1", check=False)
    assert done.returncode == 2 and "was begun with lr" in done.stderr


@pytest.mark.parametrize("name", ["train_sft.py", "train_rl.py"])
def test_two_processes_equal_one(trained, tmp_path, name):
    """The same global batch on one and on two gloo processes: the same logged loss and the same weights."""
    base = {"train_sft.py": ["--data", trained / "data/sft.jsonl", "--clips", trained / "data/clips.jsonl", "--test", "none", "--stage", "sft", *TINY, "--sft-steps", 1,
                             "--sft-lr", "3e-4"],  # Adam's first step is lr x sign(gradient): where a gradient is near 0, rounding shows
            "train_rl.py": ["--model", trained / "runs/sft", "--data", trained / "data/rl.jsonl", "--test", "none", *RL, "--steps", 1, "--questions", 4]}[name]
    outs = []
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        subprocess.run(["cp", "-r", str(trained / "runs/base"), str(out / "base")], check=True)
        target = out / "rl" if name == "train_rl.py" else out
        launch = [] if n == 1 else ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={random.randrange(20_000, 40_000)}"]
        script(*launch, name, *base, "--out", target)
        outs.append(out / ("rl" if name == "train_rl.py" else "sft"))
    logs = [[e["loss"] for e in log_of(out) if "loss" in e] for out in outs]
    assert logs[0] == pytest.approx(logs[1], abs=2e-5)
    one, two = ({**echo.load_file(o / "model/echo.safetensors"), **echo.load_file(o / "model/model.safetensors")} for o in outs)
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5


# ---------------------------------------------------------------------------------------------- pretrained parts, on stand-ins

@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A random-weight Qwen2 folder of the shape ratios of Qwen2.5-0.5B: grouped queries, biases, tied heads, a chat template."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = echo.toy_tokenizer(["How many pulses has the hum? Choose the answer from two, three."] * 3)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=len(tokenizer) + 3, hidden_size=56, intermediate_size=304, num_hidden_layers=3, num_attention_heads=14,
                         num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=tokenizer.eos_token_id)
    decoder = Qwen2ForCausalLM(config)
    decoder.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(2)
    WhisperModel(WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                               encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80, vocab_size=100, pad_token_id=0, bos_token_id=1,
                               eos_token_id=2, decoder_start_token_id=1)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def test_pretrained_decoder(qwen, monkeypatch):
    from transformers import AutoTokenizer
    plain = AutoTokenizer.from_pretrained(qwen)
    model = build(Config(decoder=str(qwen), **{k: v for k, v in MICRO.items() if k.startswith("encoder")})).eval()
    table, head = model.decoder.get_input_embeddings().weight, model.decoder.get_output_embeddings().weight
    assert table is head and model.eos_ids == {model.tokenizer.eos_token_id, 7}
    for tag in (*echo.TAGS, echo.AUDIO):
        ids = model.tokenizer(f"a{tag}b", add_special_tokens=False).input_ids
        assert ids.count(model.tokenizer.convert_tokens_to_ids(tag)) == 1
    before = echo.pretrained(lambda n: transformers.AutoModelForCausalLM.from_pretrained(n), str(qwen)).get_input_embeddings().weight
    pieces = plain("</seg>", add_special_tokens=False).input_ids
    assert len(pieces) > 1 and torch.allclose(table[model.seg_end_id], before[pieces].mean(0), atol=1e-6)
    wave = noise(2.0)
    prompt = model.prompt(wave, "How many?", ["two"])
    text = model.tokenizer.decode([i for i in prompt.ids if i != model.audio_id])
    assert text.startswith("<|im_start|>") and text.rstrip().endswith("assistant")
    rows = rollouts(model, [prompt], [wave], group=3, max_new_tokens=20)
    for r in rows:
        with torch.no_grad():
            assert (model([r.sample])[0] - torch.tensor(r.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("rate", [None, 2.0])
def test_whisper_encoder(whisper, rate):
    """Windows of 30 s, padding cut away, 25 tokens a second; a batch equals one by one."""
    torch.manual_seed(0)
    model = build(Config(**{**MICRO, "encoder": str(whisper)}, first_listen_rate=rate), ["two three"] * 3).eval()
    waves = [noise(s, i) for i, s in enumerate((0.2, 3.0, 31.0))]
    with torch.no_grad():
        full = model.encoder(waves, False)
        assert [len(t) for t in full] == [5, 75, 775] == [model.encoder.n_tokens(len(w), False) for w in waves]
        for wave, tokens in zip(waves, full):
            assert (model.encoder([wave], False)[0] - tokens).abs().max() < 1e-4
        inputs = model.encoder.extractor(waves[1].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        want = model.encoder.whisper(inputs).last_hidden_state[0, :150].view(75, 2, -1).mean(1)
        assert (full[1] - want).abs().max() < 1e-4
        first = model.encoder(waves, True)
        assert [len(t) for t in first] == [model.encoder.n_tokens(len(w), True) for w in waves] == ([1, 6, 62] if rate else [5, 75, 775])


def test_pretrained_stages_end_to_end(world, qwen, whisper, tmp_path):
    """The README's commands for pretrained parts, on the stand-ins; a frozen part takes no optimiser memory."""
    data = world / "data"
    script("train_sft.py", "--decoder", qwen, "--encoder", whisper, "--first-listen-rate", "none", "--train", "last-1", "--projector-steps", 2,
           "--checkpointing", "--tokens-per-batch", 600, "--data", data / "sft.jsonl", "--clips", data / "clips.jsonl", "--test", "none", "--out", tmp_path, *TINY)
    saved = torch.load(tmp_path / "projector/saves/step-000002/training.pt", weights_only=True)
    assert len(saved["optimizer"]["state"]) == 3  # projector weight and bias, stamp
    before, after = (echo.load_file(tmp_path / f"{s}/model/model.safetensors") for s in ("encoder", "sft"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(".layers.2." in k or "model.norm" in k for k in changed)
    published = [{k: r[k] for k in ("id", "audio_path", "question", "multi_choice", "answer")} for r in echo.read_rows(data / "rl.jsonl")]
    (tmp_path / "rows.json").write_text(json.dumps(published))
    script("train_rl.py", "--model", tmp_path / "sft", "--data", tmp_path / "rows.json", "--audio-root", data, "--test", "none", "--out", tmp_path / "rl", *RL)
    assert json.loads(script("generate.py", data / "audio/test/00000.wav", "What?", "--choices", "a", "b", "--model", tmp_path / "rl", "--json").stdout)["ended"]


class LoudnessEncoder(torch.nn.Module):
    """The README's "your own encoder": loudness of each 40 ms."""
    TOKENS_PER_SECOND, dim = 25, 4

    def n_tokens(self, n_samples, first_listen):
        return math.ceil(n_samples / 640)

    def forward(self, waves, first_listen):
        return [torch.nn.functional.pad(w, (0, -len(w) % 640)).view(-1, 640).abs().mean(1, keepdim=True).repeat(1, 4) for w in waves]


def test_your_own_encoder(model):
    mine = Echo(Config(**MICRO, first_listen_rate=None), LoudnessEncoder(), copy.deepcopy(model.decoder), model.tokenizer).eval()
    wave = noise(2.01)
    row = rollouts(mine, [mine.prompt(wave, "q", [])], [wave], max_new_tokens=5)[0]
    assert row.n_prompt > 51 and len(row.logprobs) == 5


# ---------------------------------------------------------------------------------------------- pages, in a real browser

needs_browser = pytest.mark.skipif(not shutil.which("chromedriver"), reason="no Chromium with chromedriver here: apt-get install chromium-driver")
HOSTILE = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">&amp;"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium, spoken to over WebDriver: browser(page, script, seconds) -> what the script's `return` gives after them."""
    port = random.randrange(20_000, 40_000)
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(path, body, method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method)
        return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60))["value"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for _ in range(100):
        try:
            session = "/session/" + post("/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}})["sessionId"]
            break
        except urllib.error.URLError:
            time.sleep(0.1)

    def open_page(page, script, result, seconds=0.0):
        post(session + "/url", {"url": Path(page).as_uri()})
        post(session + "/execute/sync", {"script": script, "args": []})
        time.sleep(seconds)
        return post(session + "/execute/sync", {"script": "return " + result, "args": []})
    yield open_page
    post(session, {}, "DELETE")
    driver.terminate()


def hostile_trace(model, tmp_path, monkeypatch):
    Scripted(monkeypatch, model, ["<think>" + HOSTILE + " <seg>0.5, 1.5</seg> the hum <seg>9, 10</seg> no</think><answer>hum</answer>"] * 2)
    wave = noise(3.0)
    row = rollouts(model, [model.prompt(wave, HOSTILE, ["hum", HOSTILE])], [wave], max_new_tokens=300)[0]
    generate.trace_page(tmp_path / "trace.html", model, wave, HOSTILE, ["hum", HOSTILE], "hum", row, generate.Settings(max_new_tokens=300))
    return tmp_path / "trace.html"


def test_attention_shares_against_the_uncached_pass(model, monkeypatch):
    Scripted(monkeypatch, model, TEXTS[:1])
    wave = noise(3.0)
    row = rollouts(model, [model.prompt(wave, "q", [])], [wave], max_new_tokens=200)[0]
    shares = echo.attention_shares(model, row)
    assert shares.shape == (len(row.logprobs), 2) and (shares >= 0).all() and (shares.sum(1) <= 1 + 1e-5).all()
    closed = row.sample.ids[row.n_prompt:].index(model.seg_end_id)
    assert (shares[:closed + 1, 1] == 0).all() and (shares[closed + 1:, 1] > 0).all() and (shares[:, 0] > 0).all()


def test_pages_are_self_contained_and_escape(model, tmp_path, monkeypatch):
    text = hostile_trace(model, tmp_path, monkeypatch).read_text()
    assert "<script>document.title" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text) and "prefers-color-scheme:dark" in text


@needs_browser
def test_a_chip_plays_its_segment_and_hostile_text_stays_text(model, tmp_path, monkeypatch, browser):
    page = hostile_trace(model, tmp_path, monkeypatch)
    seen = browser(page, """
        const player = document.querySelector('audio'); window.seen = [document.title];
        player.addEventListener('playing', () => seen.push(player.currentTime));
        player.addEventListener('pause', () => seen.push(player.currentTime));
        document.querySelector('button.chip').click();""", "[...seen, document.title, document.body.innerText]", 4.0)
    title, started, stopped, later, text = seen
    assert title == later == "Echo: a trace" and HOSTILE in text and "outside the clip" in text
    assert abs(started - 0.5) < 0.3 and abs(stopped - 1.5) < 0.3


@needs_browser
def test_report_and_index_in_a_browser(trained, tmp_path, browser):
    script("generate.py", "--report", trained / "runs/rl", "--against", trained / "runs/sft")
    charts, text = browser(trained / "runs/rl/report.html", "", "[document.querySelectorAll('svg').length, document.body.innerText]")
    assert charts > 15 and "mean k3 estimate" in text
    script("generate.py", "--benchmark", trained / "data/test.jsonl", "--model", trained / "runs/rl", "--limit", 6, "--html", tmp_path / "index.html")
    shown = "[...document.querySelectorAll('details')].filter(d => !d.hidden).length"
    assert browser(tmp_path / "index.html", "", shown) == 6
    assert browser(tmp_path / "index.html", "const k = document.getElementById('kind'); k.value = 'order'; k.dispatchEvent(new Event('change'))", shown) == 2


# ---------------------------------------------------------------------------------------------- python test_echo.py: speed

def one_by_one(model, prompt, wave, seed, max_new_tokens=100):
    """The published scheme, as a reference: a row at a time, the whole sequence prefilled again after each segment."""
    row = Rollout(prompt.copy(), wave, len(prompt.ids))
    draws = torch.rand(1, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    while not row.ended:
        cache, since = transformers.DynamicCache(config=model.decoder.config), 0
        while True:
            ids, position, real, spans = model.collate([row.sample], [since])
            mask = torch.ones(1, len(row.sample.ids), dtype=torch.long)
            hidden = model.hidden(ids, position, mask, spans, cache)[:, -1]
            since = len(row.sample.ids)
            token, logp, p = next(iter(echo.sample_tokens(model, hidden, [row], [0], draws, 1.0)))
            echo.add_token(model, row, token, logp, p, "interleaved", max_new_tokens)
            if row.ended or token == model.seg_end_id and echo.insert_segment(model, row, "segment", seed):
                break
    return row


def seconds(run, repeat=3):
    """The median of some timings."""
    took = []
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return sorted(took)[repeat // 2]


@torch.no_grad()
def decoding_speed(model, questions):
    waves = [load_audio(q.path) for q in questions]
    prompts = [model.prompt(w, q.question, q.choices) for w, q in zip(waves, questions)]
    batched = seconds(lambda: rollouts(model, prompts, waves, group=8, seeds=range(64), max_new_tokens=100))
    single = seconds(lambda: [one_by_one(model, prompts[i // 8], waves[i // 8], i) for i in range(64)], 1)
    same = all(a.sample.ids == one_by_one(model, prompts[i // 8], waves[i // 8], i).sample.ids
               for i, a in list(enumerate(rollouts(model, prompts, waves, group=8, seeds=range(64), max_new_tokens=100)))[::16])
    print(f"64 interleaved rollouts, batched against one by one with re-prefill: {single / batched:.1f} times the responses a second "
          f"({64 / batched:.0f} against {64 / single:.1f}); same ids: {same}")
    eos, model.eos_ids, steps = model.eos_ids, set(), 60
    prompts, waves = prompts * 8, waves * 8
    ids, position, mask, spans = model.collate(prompts, left=True)
    embeddings = model.embed(ids, spans)
    ours = seconds(lambda: rollouts(model, prompts, waves, reasoning="text", temperature=0.0, max_new_tokens=steps), 5)
    theirs = seconds(lambda: model.decoder.generate(inputs_embeds=embeddings, attention_mask=mask, do_sample=False, min_new_tokens=steps,
                                                    max_new_tokens=steps, pad_token_id=0), 5)
    model.eos_ids = eos
    print(f"64 rows, {steps} forward steps, against transformers' generate: {theirs / ours:.2f} times its speed")


def training_speed(model, questions):
    samples = [train_sft.add_grounded(model, model.prompt(load_audio(q.path), q.question, q.choices), q.row["cot"], q.path, echo.Clips(model), True)
               for q in questions]
    with torch.no_grad():
        model.embed(model.collate(samples)[0], model.collate(samples)[3])  # the encoder's tokens are cached, as in training
    ids, position, mask, spans = model.collate(samples)
    ours = seconds(lambda: (-model(samples)[0].mean()).backward(), 9)
    bare = seconds(lambda: model.decoder(input_ids=ids, attention_mask=mask, labels=ids).loss.backward(), 9)
    print(f"a training step of {mask.sum()} tokens against a bare forward and backward of the decoder: {bare / ours:.2f} times its speed")


def memory_by_part(config, tokens, rows=0, length=0, bytes_weight=4, bytes_activation=4, checkpointing=False, logits=512):
    """Gigabytes of a GRPO step by part, from the shapes of a Qwen2 config; the formulas of the README's table."""
    d, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * d // config.num_attention_heads
    n = config.vocab_size * d * (1 if config.tie_word_embeddings else 2) + d
    n += layers * (2 * d * d + 2 * d * kv + 3 * d * inner + 3 * d + 2 * kv)
    layer = 12 * d + 2 * kv + 4 * inner  # kept for the backward pass: numbers a token and layer
    parts = {"parameters (millions)": n / 1e6 * 1e9, "weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n, "reference policy": bytes_weight * n,
             "bf16 copies": 0 if bytes_activation == 4 else 2 * n,
             "activations": bytes_activation * tokens * (layers * d + layer if checkpointing else layers * layer),
             "logits, 512 positions": 3 * 4 * min(logits, tokens) * config.vocab_size,
             "KV cache of the rollout": rows * length * 2 * kv * layers * bytes_activation}
    return {k: v / 1e9 for k, v in parts.items()}


def memory_check():
    """Peak memory of a GRPO update of a mid-size decoder on this CPU against the formula."""
    import resource

    from transformers import Qwen2Config, Qwen2ForCausalLM
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    shape = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                        vocab_size=151_936, tie_word_embeddings=True)
    for checkpointing, tokens in ((True, 16_384), (False, 4096)):
        print(f"Qwen2.5-0.5B on one GPU, {tokens} tokens a micro-batch, gradient checkpointing {checkpointing}, 512 rollouts of 1,000 tokens:",
              {k: round(v, 2) for k, v in memory_by_part(shape, tokens, 512, 1000, 2, 2, checkpointing).items()})
    small = Qwen2Config(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2,
                        vocab_size=32_000, tie_word_embeddings=True)
    toy = load("runs/sft")
    before = peak()
    model = Echo(toy.config, toy.encoder, Qwen2ForCausalLM(small), toy.tokenizer)
    model.encoder.requires_grad_(False)
    reference = copy.deepcopy(model).requires_grad_(False)
    wave = load_audio("data/audio/test/00000.wav")
    samples = [model.add_response(model.prompt(Span(wave, first_listen=True), "What? " * 100, []), " the hum" * 100) for _ in range(8)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        ref = reference.log_probs(samples)
        logp, _ = model(samples)
        grpo_loss(logp, logp.detach(), ref, torch.ones_like(logp))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = sum(len(s.ids) for s in samples)
    want = memory_by_part(small, tokens)
    total = sum(v for k, v in want.items() if "millions" not in k)
    print(f"a decoder of {want['parameters (millions)']:.0f} million parameters, {tokens} tokens, on CPU: formula {total:.2f} GB, "
          f"measured peak {peak() - before:.2f} GB over what was there before; {({k: round(v, 2) for k, v in want.items()})}")


if __name__ == "__main__":
    memory_check()
    trained_model = load("runs/rl")
    decoding_speed(trained_model, echo.read_questions("data/test.jsonl")[:8])
    training_speed(trained_model.train(), echo.read_questions("data/sft.jsonl")[:32])
