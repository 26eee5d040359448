"""pytest -q: each test compares with a trusted reference, a plain loop or hand-computed values.

    python test_echo.py [runs/rl]      # after training: measures and prints what the README quotes
"""
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import (AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          WhisperConfig, WhisperFeatureExtractor, WhisperModel)

import echo
import generate
import make_data
import train_rl
import train_sft
from echo import (AUDIO, Config, EchoError, Rollout, Sample, Segment, load, load_audio,
                  parse_segment, read_questions, rollouts, save)

HERE = Path(__file__).parent
SMALL = dict(encoder_dim=32, encoder_layers=1, encoder_heads=2)
if __name__ != "__main__":
    torch.set_num_threads(1)  # quick for micro models, and other processes round alike


def run(command, *args):
    """Run "script --flag ..." and more flags in this process: exit code, stdout, stderr."""
    (name, *flags), out, err = command.split(), io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [name, *flags, *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as end:
        echo.main(sys.modules[name].run)
    return end.value.code or 0, out.getvalue(), err.getvalue()


def good(*args):
    code, out, err = run(*args)
    assert code == 0, err[-2000:]
    return out


def mistake(*args):
    """The one line that a script ends with."""
    code, _, err = run(*args)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


def error_of(call, *args, **more):
    """The one line that a call ends with."""
    with pytest.raises(EchoError) as error:
        call(*args, **more)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def process(*args):
    """A process of its own, in which Ctrl-C works even if this one was told to ignore it."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)], text=True, cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def noise(seconds, seed=0):
    return torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A micro data folder."""
    folder = tmp_path_factory.mktemp("world") / "data"
    good("make_data --train-clips 24 --test-clips 2 --out", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    rows = echo.read_rows(data / "sft.jsonl")
    return train_sft.tiny_tokenizer([f" {r['question']} Choose from {r['cot']}" for r in rows] * 2)


def micro(tokenizer, **config):
    torch.manual_seed(0)
    config = Config(**{"dim": 48, "layers": 2, **SMALL, **config})
    return echo.build(config, train_sft.tiny_decoder(config, len(tokenizer)), tokenizer).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return micro(tokenizer)


def settings(**more):
    defaults = {"mini_batches": 1, "dtype": "fp32", "tokens_per_batch": 16_384}
    return train_rl.Settings(**defaults | more)


# ------------------------------------------------------------------------------------------- audio

def wav(raw, rate=16_000, channels=1, bits=16, coding=1, says=None):
    block, size = channels * bits // 8, len(raw) if says is None else says
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, coding,
                       channels, rate, rate * block % 2 ** 32, block, bits, b"data", size) + raw


@pytest.mark.parametrize("bits,coding", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3)])
@pytest.mark.parametrize("channels,rate", [(1, 16_000), (2, 44_100), (3, 8_000)])
def test_wav_formats(tmp_path, bits, coding, channels, rate):
    loudness = (np.arange(channels) + 1) / channels
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)[:, None] * loudness
    ints = (wave * (2 ** (bits - 1) - 1)).round().astype("<i4") + 128 * (bits == 8)
    raw = wave.astype("<f4") if coding == 3 else ints[..., None].view(np.uint8)[..., :bits // 8]
    (tmp_path / "a.wav").write_bytes(wav(raw.tobytes(), rate, channels, bits, coding))
    as_it_is = load_audio(tmp_path / "a.wav", rate).numpy()
    assert np.abs(as_it_is - wave.mean(1)).max() < (0.02 if bits == 8 else 1e-4)
    resampled, t = load_audio(tmp_path / "a.wav"), np.arange(16_000) / 16_000
    gap = resampled[:16_000].numpy() - (0.5 * np.sin(2 * np.pi * 440 * t) * loudness.mean())
    assert len(resampled) == 16_000 and np.abs(gap[800:15_000]).max() < 0.02


BROKEN_AUDIO = {
    "none.wav": (None, "no such file"), "": (None, "can't be read"),
    "song.mp3": (b"ID3\x03" + b"\0" * 100, "ffmpeg -i song.mp3"),
    "cut.wav": (wav(b"\0" * 50, says=100), "50 of 100 bytes"), "empty.wav": (wav(b""), "empty"),
    "head.wav": (b"RIFF\x10\0\0\0WAVEjunk\0\0\0\0", "no 'fmt ' or no 'data' chunk"),
    "mulaw.wav": (wav(b"\0" * 4, coding=7, bits=8), "coding 7"),
    "fast.wav": (wav(b"\0" * 4, rate=4_294_967_295), "4294967295 Hz"),
    "prime.wav": (wav(b"\0" * 4, rate=767_957), "767957 Hz; convert it to 16000 first"),
    "huge.wav": (wav(struct.pack("<2f", 1e38, -1e38), bits=32, coding=3), "beyond 10,000"),
    "nan.wav": (wav(struct.pack("<2f", math.nan, 0), bits=32, coding=3), "NaN")}


@pytest.mark.parametrize("name", BROKEN_AUDIO)
def test_broken_audio_is_one_line(tmp_path, name):
    content, says = BROKEN_AUDIO[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = error_of(load_audio, tmp_path / name)
    assert says in error and name in error


# ------------------------------------------------------------------------------- encoder and model

@pytest.mark.parametrize("rate", [2.0, 0.0])
@pytest.mark.parametrize("first_listen", [True, False])
def test_encoder_batch_equals_one_by_one(tokenizer, rate, first_listen):
    model = micro(tokenizer, first_listen_rate=rate)
    waves = [noise(s, i) for i, s in enumerate((6.0, 0.2, 1.03, 2.5) * 9)]
    for wave, tokens in zip(waves, model.hear(waves, first_listen)):
        a_second = rate if first_listen and rate else 25
        assert len(tokens) == math.ceil(len(wave) / 16_000 * a_second)
        assert (tokens - model.hear([wave], first_listen)[0]).abs().max() < 1e-4


def test_first_listen_lacks_the_detail(model):
    """Two clips that differ in the number of pulses alone."""
    tone, clips = np.sin(2 * np.pi * 900 * np.arange(16_000) / 16_000), []
    for n in (2, 6):
        clips.append(0.1 * noise(6.0, 1))
        clips[-1][32_000:48_000] += 0.1 * torch.tensor(tone * make_data.pulse_train(n, 16_000))
    (two, six), (full_two, full_six) = model.hear(clips, first_listen=True), model.hear(clips)
    assert (two - six).abs().max() < 0.2 * (full_two - full_six).abs().max()


def dialogue(model, seed=0, seconds=3.0):
    """A prompt, some text, a re-listened segment, more text and eos."""
    wave = noise(seconds, seed)
    sample = model.prompt(model.hear([wave], True)[0], "How many pulses?", ["two", "three"])
    sample.add(model.ids("<think>I look for the hum <seg>0.5, 1.5</seg>"), trained=True)
    sample.add_audio(model.hear([wave[8000:24_000]])[0], model.config.share_position)
    return model.add_response(sample, " the hum has two pulses.</think><answer>two</answer>")


def test_log_probs_in_a_batch_and_in_chunks_equal_one_by_one(model):
    parts = copy.deepcopy(model)
    whole = echo.prepare(copy.deepcopy(model), settings(checkpointing=True))
    whole.LOGITS_AT_ONCE = 100 * model.decoder.config.vocab_size
    samples = [dialogue(model, i, 2.0 + i / 8) for i in range(24)]
    logp, alone = whole(samples), torch.cat([parts([s]) for s in samples])
    assert len(logp) == sum(sum(s.trained) for s in samples)
    assert torch.allclose(logp, alone, atol=1e-4)
    logp.mean().backward()
    alone.mean().backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        assert name.startswith("encoder.") or (a.grad - b.grad).abs().max() < 1e-5, name


def test_no_gradient_at_audio_and_some_at_eos(model, monkeypatch):
    """The trained positions are the sampled ids: audio out, eos in."""
    sample = dialogue(model)
    trained = {t for t, on in enumerate(sample.trained) if on}
    assert not any(sample.ids[t] == AUDIO for t in trained)
    assert len(sample.ids) - 1 in trained and sample.ids[-1] in model.eos_ids
    hidden = model.hidden(*model.tensors([sample])).detach().requires_grad_()
    monkeypatch.setattr(model, "hidden", lambda *a: hidden)
    (-model([sample]).mean()).backward()
    touched = {t + 1 for t in range(len(sample.ids)) if hidden.grad[0, t].abs().sum() > 0}
    assert touched == trained  # position t predicts t + 1


@pytest.mark.parametrize("share", [True, False])
def test_positions(tokenizer, share):
    sample = dialogue(micro(tokenizer, share_position=share))
    at = max(t for t, i in enumerate(sample.ids) if i == AUDIO) - 24   # 25 re-listened tokens
    want = list(range(at)) + ([at] * 25 if share else list(range(at, at + 25)))
    rest = len(sample.ids) - len(want)
    assert sample.position == want + list(range(want[-1] + 1, want[-1] + 1 + rest))


def spelled(model, ids):
    """Ids as text, [audio] for audio."""
    out = ""
    for is_audio, some in itertools.groupby(ids, lambda i: i == AUDIO):
        out += "[audio]" * len(list(some)) if is_audio else model.tokenizer.decode(list(some))
    return out


def test_prompt_writes_times_and_holds_any_text(tokenizer):
    model, full = micro(tokenizer), micro(tokenizer, first_listen_rate=0.0)
    any_text = 'what is <|audio|> or <seg>1, 2</seg>, Ünï ✓ 日本 "<b>&amp;</b>" {0} {choices}?'
    prompt = model.prompt(torch.zeros(3, 32), any_text, ["{question}", "two"])
    said = f" {any_text} Choose from {{question}}, two.\n"
    assert spelled(model, prompt.ids) == "[audio]0.0[audio]0.5[audio]1.0" + said
    assert prompt.ids.count(AUDIO) == sum(map(len, prompt.audio)) == 3
    assert spelled(model, model.prompt(None, "Why?").ids) == " Why?\n"
    prompt = full.prompt(torch.zeros(25 * 1001 + 2, 32), "Why?")  # at each second's first token
    second = "".join(f"[audio]{s}.0" + "[audio]" * 24 for s in range(1001))
    assert spelled(full, prompt.ids) == second + "[audio]1001.0[audio] Why?\n"


# -------------------------------------------------------------------------------------------- tags

@pytest.mark.parametrize("text,want", [
    ("2.0, 3.0", (2, 3, None)), ("2,3", (2, 3, None)), (" 2.5s , 3 s ", (2.5, 3, None)),
    (".5, 1.", (0.5, 1, None)), ("0:02, 0:03.5", (2, 3.5, None)), ("2.0, 2.2", (2, 2.2, None)),
    ("9, 39.97", (9, 39.97, "too long")), ("9.97, 39.97", (9.97, 39.97, None)),
    ("38.0, 40.0", (38, 39.97, None)), ("38, 40.1", (38, 40.1, "outside the clip")),
    ("0, 600", (0, 600, "outside the clip")), ("1:00, 1:02", (60, 62, "outside the clip")),
    ("3, 2", (3, 2, "reversed")), ("2.0, 2.1", (2, 2.1, "too short")),
    *((bad, (None, None, "malformed")) for bad in ("1.2.3, 4", "-1, 2", "1", "1, 2, 3", "", "a, b",
                                                   "1e3, 2e3", "nan, inf", "0:75, 2:00", "٣, ٤"))])
def test_segment_tags(text, want):
    got = parse_segment(text, 39.97)
    assert (got.start_s, got.end_s, got.reason) == want


def test_ten_thousand_hostile_tags():
    rng, reasons = np.random.default_rng(0), set()
    alphabet = [*"019., :s-e\n\0²∞٣", "<seg>", "</seg>", "9" * 400, "1, 2", "1, 1.1", "1, 33"]
    for _ in range(10_000):
        text, turns = "".join(rng.choice(alphabet, rng.integers(9))), rng.integers(10)
        segment = parse_segment(text, 60.0, turns)
        reasons.add((segment.reason, turns >= 8))
        if segment.reason is None:
            assert 0 <= segment.start_s < segment.end_s <= 60
            assert 0.2 - 1e-6 <= segment.end_s - segment.start_s <= 30 + 1e-6
    want = {(None, False), ("too many turns", True)}  # after eight of them
    assert reasons == want | {(r, late) for r in echo.REASONS[:5] for late in (False, True)}


# ---------------------------------------------------------------------------------------- decoding

def asked(model, waves):
    """Prompts, no two alike."""
    return [model.prompt(features, "Which comes first?" + " Which?" * i, ["hum", "bell"])
            for i, features in enumerate(model.hear(waves, True))]


def respond(model, waves, group=1, **more):
    return rollouts(model, asked(model, waves), waves, group, **more)


@pytest.fixture
def write(monkeypatch):
    """write(model, texts): make the row with seed i write texts[i], by replacing what is sampled
    and nothing else."""
    def write(model, texts):
        ids = [[*model.ids(text), model.tokenizer.eos_token_id] for text in texts]

        def sample_tokens(model, hidden, rows, temperature):
            logp = model.decoder.lm_head(hidden / (temperature or 1.0)).float().log_softmax(-1)
            tokens = [ids[row.draws.initial_seed()][len(row.logprobs)] for row in rows]
            return tokens, [logp[k, token].item() for k, token in enumerate(tokens)]
        monkeypatch.setattr(echo, "sample_tokens", sample_tokens)
    return write


def watch_passes(monkeypatch, model):
    """A list that gets the mask and the KV cache of each forward pass."""
    passes, hidden = [], model.hidden

    def watched(ids, position, mask, audio, cache=None):
        passes.append((mask, cache))
        return hidden(ids, position, mask, audio, cache)
    monkeypatch.setattr(model, "hidden", watched)
    return passes


def same(a, b):
    return a.sample.ids == b.sample.ids and a.sample.position == b.sample.position and \
        a.ended == b.ended and np.allclose(a.logprobs, b.logprobs, atol=1e-4)


TEXTS = ["<think>a <seg>0.5, 1.5</seg> b. Then <seg>1.0, 2.0</seg> c</think><answer>hum</answer>",
         "<think>look <seg>9, 10</seg> a <seg>1, 0</seg> b <seg>x</seg> c</seg> d</think>",
         "<answer>two Ünïcode ✓ 日本</answer>",
         "<think><seg> <seg>0, 1</seg><seg>3.5, 6.1</seg> both</think><answer>bell</answer>"]


def test_interleaved_rollout_hears_the_right_part_and_matches_training(model, write):
    """Batched, cached, waiting rows: log-probs are those of a plain uncached pass over the ids."""
    waves = [noise(3.0 + i, i) for i in range(4)]
    write(model, TEXTS)
    rows = respond(model, waves, temperature=0.7, max_new_tokens=200)
    assert [r.text for r in rows] == TEXTS and echo.is_right(rows[2].text, "two ünïcode ✓ 日本")
    bad = ["outside the clip", "reversed", "malformed", "malformed"]
    assert [[s.reason for s in r.segments] for r in rows] == [[None] * 2, bad, [], [None] * 2]
    places = [[(8000, 24_000), (16_000, 32_000)], [], [], [(0, 16_000), (56_000, 96_000)]]
    for r, prompt, wave, heard in zip(rows, asked(model, waves), waves, places):
        want = [model.hear([wave[start:end]])[0] for start, end in heard]
        again = r.sample.audio[len(prompt.audio):]
        assert len(again) == len(want)
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(again, want))
        assert r.ended == "eos" and sum(r.sample.trained) == len(r.logprobs)
        logp = model.log_probs([r.sample], temperature=0.7)[0]
        assert (logp - torch.tensor(r.logprobs)).abs().max() < 1e-4
    written = spelled(model, rows[0].sample.ids[rows[0].n_prompt:-1])
    assert written == TEXTS[0].replace("</seg>", "</seg>" + "[audio]" * 25)
    answer = [model.piece(i) for i in model.ids(TEXTS[3])].index("bell")
    assert rows[3].confidence == pytest.approx(math.exp(rows[3].logprobs[answer]))


def test_rows_wait_for_each_other_but_not_for_the_last(model, write, monkeypatch):
    """8 rows with 0 to 7 segments: each as alone, in few passes, ended rows and padding dropped."""
    texts = ["".join(" the hum" * (20 if (i + k) % 8 == 7 else 1) + "<seg>0, 0.2</seg>" * (k < i)
                     for k in range(i + 1)) for i in range(8)]
    waves, more = [noise(2.0, i) for i in range(4)], dict(max_new_tokens=200, temperature=0.7)
    write(model, texts)
    passes = watch_passes(monkeypatch, model)
    rows = respond(model, waves, 2, **more)
    n_passes, last, longest = len(passes), passes[-1][0], max(len(r.logprobs) for r in rows)
    assert longest <= n_passes < 1.25 * longest  # waiting for the last row takes twice as many
    assert last.shape[0] == 1 and last.shape[1] < len(rows[7].sample.ids) + 10
    assert 0 < generate.response_metrics(rows)["padding"] < 0.5
    split, prompts = respond(model, waves, 2, max_rows=3, **more), asked(model, waves)
    for i, (r, s) in enumerate(zip(rows, split)):
        alone, = rollouts(model, [prompts[i // 2]], [waves[i // 2]], seeds=[i], **more)
        assert r.text == texts[i] and len(r.heard) == i and same(r, alone) and same(r, s)


def test_inserted_audio_changes_what_follows_and_controls_differ(model, write):
    wave, after = noise(3.0), set()
    closed = len(model.ids(TEXTS[0].partition("</seg>")[0] + "</seg>"))
    write(model, TEXTS)
    for how in ({}, {"insert": "random"}, {"insert": "silence"}, {"reasoning": "text"}):
        row, = respond(model, [wave], **how)
        inserted = row.sample.ids[row.n_prompt + closed:][:25] == [AUDIO] * 25
        assert inserted == bool(row.heard) == ("reasoning" not in how)
        after.add(tuple(row.logprobs[closed:closed + 3]))
    assert len(after) == 4 and row.segments[0].reason == "text reasoning"
    row, = respond(model, [wave], max_new_tokens=closed)
    assert (row.ended, row.segments[0].reason) == ("length", "no room left")
    assert row.sample.ids[-1] != AUDIO


def test_sampled_rollouts_do_not_depend_on_their_batch(model):
    waves = [noise(2.0 + i, i) for i in range(3)]
    prompts, more = asked(model, waves), dict(max_new_tokens=30)
    together = rollouts(model, prompts, waves, group=2, seeds=range(6), **more)
    for i, row in enumerate(together):
        alone, = rollouts(model, [prompts[i // 2]], [waves[i // 2]], seeds=[i], **more)
        assert same(row, alone)
    assert together[0].sample.ids != together[1].sample.ids


def test_greedy_equals_transformers_generate(model):
    waves = [noise(2.0)]
    ours, = respond(model, waves, reasoning="text", temperature=0.0, max_new_tokens=20)
    ids, _, mask, audio = model.tensors(asked(model, waves))
    theirs = model.decoder.generate(
        inputs_embeds=model.embed(ids, audio), attention_mask=mask, do_sample=False,
        max_new_tokens=20, eos_token_id=list(model.eos_ids), pad_token_id=0)[0].tolist()
    assert ours.sample.ids[ours.n_prompt:] == theirs


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_sampling_follows_the_probabilities(model, temperature):
    """4,000 first tokens against the softmax itself."""
    waves, n = [noise(1.0)], 4000
    ids, _, _, audio = model.tensors(asked(model, waves))
    with torch.no_grad():
        logits = model.decoder(inputs_embeds=model.embed(ids, audio)).logits[0, -1]
    p = (logits / temperature).softmax(-1)
    rows = respond(model, waves, n, temperature=temperature, max_new_tokens=1)
    tokens = torch.tensor([row.sample.ids[-1] for row in rows])
    shares = torch.bincount(tokens, minlength=len(p)) / n
    assert ((shares - p).abs() < 5 * (p / n).sqrt() + 1e-3).all() and p.max() > 0.02
    logp = torch.tensor([row.logprobs[0] for row in rows])
    assert torch.allclose(logp, p.log()[tokens], atol=1e-4)


# -------------------------------------------------------------------------------- rewards and GRPO

GOOD = "<think>a <seg>1, 2</seg> the hum.</think><answer>hum</answer>"


@pytest.mark.parametrize("text,heard,parts", [
    (GOOD, 1, (0.5, 0, 0.5, 0.5)), (GOOD, 0, (0.5, 0, 0.5, 0)), ("", 0, (0, 0, 0, 0)),
    (GOOD.replace("hum</answer>", "bell</answer>"), 1, (0.5, 0, 0, 0)),
    (GOOD.replace("</seg> the", "</seg> The"), 1, (0.5, -0.1, 0.5, 0.5)),    # behind a space, too
    (GOOD.replace("</seg> the", "</seg>The"), 1, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> the hum.", "</seg>."), 1, (0.5, -0.1, 0.5, 0.5)),  # no word said
    (GOOD.replace("</seg> the", "</seg>, the"), 1, (0.5, 0, 0.5, 0.5)),
    (GOOD.replace("</seg> t", "</seg> <seg>2, 3</seg> T"), 2, (0.5, -0.2, 0.5, 0.5)),
    (GOOD.replace(" the hum.", "<seg>1, 2</seg>" * 6), 7, (0.5, -0.5, 0.5, 0.5)),
    ("a <seg>1, 2</seg>", 1, (0, -0.1, 0, 0)), ("<think>a</think> hum", 0, (0, 0, 0, 0)),
    ("<think>a</think><answer>Hum.</answer>", 0, (0.5, 0, 0.5, 0)),
    ("<think>a</think><answer>hum</answer><answer>bell</answer>", 0, (0, 0, 0, 0)),
    ("<answer>hum</answer><think>a</think>", 0, (0, 0, 0.5, 0)),
    ("<think>a<think>b</think><answer>hum</answer>", 0, (0, 0, 0.5, 0))])
def test_rewards_by_hand(text, heard, parts):
    segments = [Segment("1, 2", 1, 2, heard=True)] * heard + [Segment("x", reason="malformed")]
    row = Rollout(Sample(), None, None, segments=segments, text=text, confidence=0.8)
    got = echo.REWARDS["paper"](row, "hum")
    assert list(got) == ["format", "consistency", "accuracy", "segment"]
    assert tuple(got.values()) == pytest.approx(parts)
    want = 0.5 * (1 - 0.2 ** 2) if parts[2] else -0.5 * 0.8 ** 2
    got = echo.REWARDS["confidence"](row, "hum")
    assert tuple(got.values()) == pytest.approx((*parts[:2], want, want if parts[3] else 0))


def test_advantages_and_flat_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.5, 0.5, 0.5, 0.5]])
    got = echo.group_advantages(rewards)
    assert got[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3) and got[1].tolist() == [0] * 4
    assert got[2].tolist() == pytest.approx([1.732, -0.577, -0.577, -0.577], abs=1e-2)


def test_micro_batches_cover_everything_within_budget():
    batches = echo.micro_batches([Sample(ids=[0] * n) for n in (3, 9, 2, 30, 5, 5, 5)], 20)
    assert batches == [[0, 1], [2], [3], [4, 5, 6]]


class Watched(echo.Training):
    """A training whose update keeps the gradients and changes nothing."""
    def update(self, lr):
        self.gradients = {k: p.grad.clone() for k, p in self.trained.items() if p.grad is not None}


@pytest.mark.parametrize("budget", [300, 16_384])
def test_grpo_update_against_a_plain_double_loop(model, tmp_path, write, budget):
    """One update in micro-batches, against tokens one by one: gradient and metrics."""
    policy, plain, reference = (copy.deepcopy(model) for _ in range(3))
    with torch.no_grad():  # a reference and an older policy that differ
        for p in reference.decoder.parameters():
            p += 1e-3
    waves, advantages = [noise(2.0 + i, i) for i in range(4)], torch.tensor([1.0, -0.5, 0.3, 2.0])
    write(model, TEXTS)
    responses = respond(model, waves, temperature=0.7)
    for r in responses:
        r.logprobs = [x + 0.3 * (-1) ** t for t, x in enumerate(r.logprobs)]
    how = settings(temperature=0.7, tokens_per_batch=budget)
    training = Watched(tmp_path, echo.prepare(policy, how), {})
    got = echo.grpo_update(training, policy, reference, responses, advantages, how, 1.0)
    total, want = 0.0, np.zeros(5)
    for r, advantage in zip(responses, advantages):
        ref, = reference.log_probs([r.sample], 0.7)
        for p, old, base in zip(plain([r.sample], 0.7), r.logprobs, ref):
            ratio, k3 = (p - old).exp(), (base - p).exp() - (base - p) - 1
            free, bounded = ratio * advantage, ratio.clamp(0.8, 1.2) * advantage
            loss = -min(free, bounded) + 0.04 * k3
            share = 1 / len(r.logprobs) / 4  # mean over a response's tokens, then over responses
            total = total + share * loss
            parts = loss.item(), k3.item(), float(bounded < free), -old, abs(p.item() - old)
            want += share * np.array(parts)
    total.backward()
    assert list(got) == ["loss", "kl", "clip_share", "entropy", "logp_gap"]
    assert list(got.values()) == pytest.approx(want, abs=1e-4) and (want[1:] > 0).all()
    for k, p in plain.named_parameters():
        assert k not in training.gradients or (training.gradients[k] - p.grad).abs().max() < 1e-4, k


@pytest.mark.parametrize("flat,updated", [("keep", 8), ("drop", 4), ("drop", 0)])
def test_flat_groups_in_the_update(model, data, tmp_path, monkeypatch, flat, updated):
    """Two questions of four responses: both groups are flat, or the second has an advantage. The
    reward is one of your own."""
    rewards, seen = iter([1.0] * 4 + [1.0, 0.0, 0.0, 0.0] if updated else [1.0] * 8), []
    monkeypatch.setitem(echo.REWARDS, "mine", lambda *a: {"mine": next(rewards)})
    update = train_rl.grpo_update
    monkeypatch.setattr(train_rl, "grpo_update", lambda *a: seen.append(a) or update(*a))
    how = settings(reward="mine", flat=flat, steps=9, questions=2, group=4, lr=1e-3,
                   max_new_tokens=5)
    policy = echo.prepare(copy.deepcopy(model), how)
    before, training = copy.deepcopy(policy.state_dict()), echo.Training(tmp_path, policy, {})
    train_rl.grpo_step(training, policy, model, read_questions(data / "rl.jsonl"), how)
    assert len(seen[0][3]) == len(seen[0][4]) == updated
    assert equal(before, policy.state_dict()) == (not updated)
    (entry,), mean = log_of(tmp_path), 0.625 if updated else 1
    assert entry["flat_groups"] == (0.5 if updated else 1) and entry["mine"] == mean
    assert entry["reward"] == mean


def test_response_metrics_by_hand():
    heard = [Segment("", a, b, heard=True) for a, b in ((0, 2), (1, 3), (4, 4.3), (0, 1))]
    bad = Segment("x", reason="malformed")
    rows = [Rollout(Sample(ids=[5, AUDIO, AUDIO]), None, None, logprobs=[0.0] * 10, text=GOOD,
                    ended="eos", segments=[*heard[:3], bad]),
            Rollout(Sample(), None, None, logprobs=[0.0] * 20, ended="length", segments=heard[3:],
                    cached=30, computed=40)]
    want = {"segments": 2, "segment_s": 5.3 / 4, "short_segments": 1 / 4, "overlap": 1 / 5.3,
            "listened_once": 1, "listened_twice": 0.5, "truncated": 0.5, "no_answer": 0.5,
            "length": 15, "audio_tokens": 1, "padding": 0.25, "rejected_malformed": 0.2}
    want |= {f"rejected_{x.replace(' ', '_')}": 0 for x in echo.REASONS[1:]}
    assert generate.response_metrics(rows) == pytest.approx(want)
    assert generate.response_metrics([]) == dict.fromkeys(want, 0)


# ------------------------------------------------------------------ pretrained parts, on stand-ins

@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Random-weight Qwen2s of Qwen2.5-0.5B's ratios, by tied heads or not. As there, "</seg>" is
    several pieces, and ">," or "></" may hold its end."""
    bpe, folders = ByteLevelBPETokenizer(), {}
    texts = ["<seg>1, 2</seg>, the hum</seg></think><answer>two", "How many pulses? Choose"] * 3
    bpe.train_from_iterator(texts, special_tokens=["<|endoftext|>", "<|im_end|>"])
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("qwen")
        torch.manual_seed(1)
        decoder = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=bpe.get_vocab_size() + 3, hidden_size=56, intermediate_size=304,
            num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2,
            initializer_range=0.1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1))
        decoder.generation_config.eos_token_id = [1, 7]
        decoder.save_pretrained(folders[tied])
        bpe.save(str(folders[tied] / "tokenizer.json"))
        PreTrainedTokenizerFast.from_pretrained(
            folders[tied], eos_token="<|im_end|>",
            pad_token="<|endoftext|>").save_pretrained(folders[tied])
    return folders


def pretrained(folder, train="none", dtype="fp32", **config):
    torch.manual_seed(0)
    return echo.prepare(echo.build(Config(decoder=str(folder), **SMALL | config)),
                        settings(train=train, dtype=dtype)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train,parts", [
    ("decoder", r"projector|decoder\.model\.(layers|norm)"), ("projector", "projector"),
    ("last-1", r"projector|decoder\.model\.(layers\.2|norm)")])
def test_what_is_trained_of_a_pretrained_decoder(qwen, tied, train, parts):
    """Never its table nor its head; whether they are one, stays."""
    model = pretrained(qwen[tied], train)
    assert (model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight) == tied
    for name, p in model.named_parameters():
        assert p.requires_grad == bool(re.match(parts, name)), name


def test_a_pretrained_decoder_writes_tags_as_ordinary_text(qwen, write):
    """Audio comes after the token that closes a tag, even if that token holds more."""
    model = pretrained(qwen[True])
    assert len(model.tokenizer) == len(AutoTokenizer.from_pretrained(qwen[True]))
    assert model.eos_ids == {1, 7}
    texts = ["<think>a <seg>0, 0.2</seg>, it <seg>0, .4</seg></think><answer>two</answer>",
             "a <seg>9, 10</seg>, <seg>0, 0.2</seg> b"]
    want = ["<think>a <seg>0, 0.2</seg>,{0} it <seg>0, .4</seg></{0}{0}think><answer>two</answer>",
            "a <seg>9, 10</seg>, <seg>0, 0.2</seg>{0} b"]
    pieces = [model.piece(i) for i in model.ids(texts[0])]
    assert "</seg>" not in pieces and ">," in pieces and "></" in pieces
    write(model, texts)
    for k, r in enumerate(respond(model, [noise(1.0)], group=2)):
        new, on = r.sample.ids[r.n_prompt:], r.sample.trained[r.n_prompt:]
        assert [i for i, sampled in zip(new, on) if sampled] == [*model.ids(texts[k]), 1]
        assert spelled(model, new[:-1]) == want[k].format("[audio]" * 5) and r.text == texts[k]
        assert [s.heard for s in r.segments] == [k == 0, True]
        assert torch.allclose(model.log_probs([r.sample])[0], torch.tensor(r.logprobs), atol=1e-4)


@pytest.mark.parametrize("tied,train", [(True, "decoder"), (False, "last-1"), (True, "projector")])
def test_bf16_keeps_in_fp32_what_it_must(qwen, monkeypatch, tied, train):
    """Weights that are trained, rotary angles, what is heard, and the logits in training."""
    exact = pretrained(qwen[tied]).hear([noise(3.0)])[0]
    policy = pretrained(qwen[tied], train, "bf16")
    for p in policy.decoder.parameters():
        if p.dim() == 2 or p.requires_grad:
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    assert policy.decoder.model.rotary_emb.inv_freq.dtype == torch.float32
    with policy.autocast():
        assert torch.equal(policy.hear([noise(3.0)])[0], exact)
    hidden = (20 * torch.randn(1, 2, 56)).bfloat16().float()  # bf16 would round logits by 0.06
    monkeypatch.setattr(policy, "hidden", lambda *a: hidden)
    want = F.linear(hidden[0, :1], policy.decoder.lm_head.weight.float()).log_softmax(-1)
    assert (policy([Sample([4, 5], [False, True], [0, 1])]) - want[0, 5]).abs() < 1e-3


@pytest.mark.parametrize("decoder,train", [("tiny", "decoder"), (True, "decoder"),
                                           (False, "last-1"), (True, "projector")])
def test_bf16_update_begins_at_the_reference(model, qwen, write, monkeypatch, tmp_path, decoder,
                                             train):
    """Before an update the KL is 0 and the ratio 1; the cache is bf16."""
    model = model if decoder == "tiny" else pretrained(qwen[decoder])
    policy, reference = (echo.prepare(copy.deepcopy(model), settings(train=what, dtype="bf16"))
                         for what in (train, "none"))
    wave = noise(3.0)
    prompts = asked(policy, [wave])
    prompts[0].position[6:] = [at + 2000 for at in prompts[0].position[6:]]  # rotary angles far out
    passes = watch_passes(monkeypatch, policy)
    write(policy, ["a <seg>0, 1</seg> two pulses" + " <hum>" * i for i in range(4)])
    responses = rollouts(policy, prompts, [wave], 4, max_new_tokens=100)
    assert all(layer.keys.dtype == layer.values.dtype == torch.bfloat16
               for _, cache in passes for layer in cache.layers)
    samples, advantages = [r.sample for r in responses], torch.tensor([1.0, -0.5, 0.3, 2.0])
    assert all(map(torch.equal, policy.log_probs(samples), reference.log_probs(samples)))
    for n in (1, 2):  # with two mini-batches old log-probs come from other padding, which rounds
        training, how = Watched(tmp_path, policy, {}), settings(mini_batches=n)
        got = echo.grpo_update(training, policy, reference, responses, advantages, how, 1.0)
        assert got["kl"] == pytest.approx(0, abs=0 if n == 1 else 1e-5)
        assert got["clip_share"] == 0 < got["logp_gap"] < 0.1
        assert got["loss"] == pytest.approx(-0.7, abs=1e-6 if n == 1 else 1e-2)
    training = echo.Training(tmp_path, policy, {})  # with an update between them, ratios move
    got = echo.grpo_update(training, policy, reference, responses, advantages, how, 0.01)
    assert got["clip_share"] > 0


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(2)
    WhisperModel(WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=100,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_whisper_encoder(tokenizer, whisper, rate):
    """Windows of 30 s, padding cut away, 25 tokens a second; a batch equals one by one."""
    model = micro(tokenizer, encoder=str(whisper), first_listen_rate=rate)
    waves = [noise(s, i) for i, s in enumerate((0.2, 2.2, 31.0))]
    full, first = model.hear(waves), model.hear(waves, True)
    assert [len(t) for t in full] == [5, 55, 775]
    assert [len(t) for t in first] == ([1, 5, 62] if rate else [5, 55, 775])
    for wave, tokens in zip(waves, full):
        assert (model.hear([wave])[0] - tokens).abs().max() < 1e-4
        extractor, last = WhisperFeatureExtractor(), wave[len(wave) // 480_000 * 480_000:]
        window = extractor(last.numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            want = model.encoder.whisper(window.input_features).last_hidden_state[0]
        want = want.view(750, 2, -1).mean(1)[:(len(tokens) - 1) % 750 + 1]
        assert (tokens[-len(want):] - want).abs().max() < 1e-4
    want = full[1]
    if rate:  # the mean of the tokens that touch each half second
        want = torch.stack([want[i * 25 // 2:(i * 25 + 26) // 2].mean(0) for i in range(5)])
    assert (first[1] - want).abs().max() < 1e-4


class LoudnessEncoder(torch.nn.Module):
    """The README's "your own encoder": loudness of each 40 ms."""
    TOKENS_PER_SECOND, dim = 25, 4

    def forward(self, waves, first_listen):
        padded = [F.pad(w, (0, -len(w) % 640)).view(-1, 640) for w in waves]
        return [w.abs().mean(1, keepdim=True).repeat(1, 4) for w in padded]


def test_your_own_encoder(model, write):
    config, wave = Config(first_listen_rate=0.0), torch.arange(2.0).repeat_interleave(16_000)
    mine = echo.Echo(config, LoudnessEncoder(), model.decoder, model.tokenizer)
    write(mine, TEXTS)
    row, = respond(mine, [wave])
    heard = torch.cat(row.sample.audio)[:, 0].round().int().tolist()
    assert heard == [0] * 25 + [1] * 25 + [0] * 13 + [1] * 12 + [1] * 25


@pytest.mark.parametrize("module", [train_sft, train_rl])
def test_settings_follow_the_decoder(module, monkeypatch, capsys):
    first, *others = own = module.Settings.PRETRAINED
    monkeypatch.setattr(sys, "argv", ["script", f"--{first}", "7"])  # what is given stays
    parsed = echo.parse_settings(module.Settings, "")
    echo.follow_decoder(parsed, "tiny")
    assert parsed == module.Settings(**{first: 7}) and not capsys.readouterr().out
    echo.follow_decoder(parsed, "some/qwen")
    assert parsed == module.Settings(**own | {first: 7})
    assert f"{others[-1]} {own[others[-1]]}" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- data

def test_judge_catches_every_planted_fault():
    kinds, faults = list(make_data.SYNTHETIC), make_data.QA_FAULTS | make_data.COT_FAULTS
    assert {"take_back", "embellish"} < faults.keys() and len(faults) == 14
    for i in range(60):
        rng = np.random.default_rng([3, i])
        _, events = make_data.synthesise(rng)
        for category in make_data.CATEGORIES:
            row = make_data.write_row(category, events, rng)
            assert make_data.judge_qa(row, events) is make_data.judge_cot(row, events) is None
            assert row["answer"] in row["multi_choice"] and len(set(row["multi_choice"])) == 4
            for name, plant in faults.items():
                bad = row | plant(row, events, kinds, rng)
                qa = make_data.judge_qa(bad, events)
                assert bool(qa) == (name in make_data.QA_FAULTS), (name, bad)
                assert qa or make_data.judge_cot(bad, events), (name, bad)
            for a, b in (("<think>", "<think>Well. "), ("</think>", " So be it.</think>"),
                         (" <seg>", ", so <seg>"), ("</seg> the", "</seg> surely the")):
                assert make_data.judge_cot(row | {"cot": row["cot"].replace(a, b, 1)}, events)


def test_same_seed_same_bytes_and_no_shared_clips(data, tmp_path):
    good("make_data --train-clips 24 --test-clips 2 --out", tmp_path)
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 31
    assert all((data / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    good("make_data --train-clips 2 --test-clips 2 --seed 1 --out", tmp_path)
    train = {p.read_bytes() for p in (data / "audio/train").iterdir()}
    assert (tmp_path / "audio/train/00000.wav").read_bytes() not in train
    assert not train & {p.read_bytes() for p in (data / "audio/test").iterdir()}
    sft, rl = (echo.read_rows(data / f"{name}.jsonl") for name in ("sft", "rl"))
    assert set(rl[0]) == {"id", "audio_path", "question", "multi_choice", "answer"}
    assert set(sft[0]) == set(rl[0]) | {"cot"}


def test_recorded_sounds(tmp_path, monkeypatch):
    """Four recordings for each of five kinds; what is held out is heard in the test alone."""
    folder, kinds, used = tmp_path / "sounds", {"big-drum", "tabla-na", "hiss", "gong", "e3"}, {}
    for k, name in enumerate(("Big Drum", "tabla_na", "HISS", "gong", "e3")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            sound = noise(0.3 + 0.5 * i, 10 * k + i).clamp(-1, 1)
            (folder / name / f"{i}.WAV").write_bytes(make_data.wav_bytes(sound))
    real = make_data.make_split
    monkeypatch.setattr(make_data, "make_split", lambda *a: used.update({a[1]: a[3]}) or real(*a))
    job = ["make_data --train-clips 6 --test-clips 2 --qa-faults 0 --cot-faults 0 --hold-out 0.25",
           "--sounds", folder, "--out", tmp_path / "data"]
    good(*job)
    assert set(used["train"]) == set(used["test"]) == kinds
    for kind in kinds:
        train, test = ({x.tobytes() for x in used[split][kind]} for split in ("train", "test"))
        assert (len(train), len(test)) == (3, 1) and not train & test
    assert len(echo.read_rows(tmp_path / "data/sft.jsonl")) == 18  # no row is broken
    clips = echo.read_rows(tmp_path / "data/clips.jsonl")
    assert {e["kind"] for clip in clips for e in clip["A4_events"]} == kinds
    for i in (1, 2, 3):
        (folder / f"gong/{i}.WAV").unlink()
    assert "needed: at least 2" in mistake(*job)
    shutil.rmtree(folder / "gong")
    assert "4 folders" in mistake(*job)
    (folder / "big_drum").mkdir()
    assert "kind 'big-drum'" in mistake(*job)


ROW = {"question": "q", "answer": "a", "audio_path": "x.wav", "multi_choice": ["a", "b"]}


@pytest.mark.parametrize("content,says", [
    (ROW | {"question": ""}, "row 1: no text under 'question'"),
    (ROW | {"answer": 3}, "row 1: no text under 'answer'"),
    (ROW | {"audio_path": 3}, "row 1: no 'audio_path'"),
    (ROW | {"multi_choice": "ab"}, "row 1: no 'multi_choice'"),
    (ROW | {"answer": "c"}, "row 1: the answer 'c' is not among the choices"),
    (json.dumps(ROW) + '\n{"question": \n', "row 2: not JSON"), ("[1]", "row 1"),
    ('[{"question": "q"', "line 1: not JSON"), ("", "no rows"), ("[]", "no rows"),
    (b"\xff\xfe{\0}\0", "byte 0: not UTF-8"), (b'{"question": "\xe9"}', "byte 14: not UTF-8")])
def test_broken_rows_are_one_line(tmp_path, content, says):
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = error_of(read_questions, tmp_path / "r.jsonl")
    assert says in error and "r.jsonl" in error


def test_rows_as_published(tmp_path):
    """A byte order mark, MMAU's lists of categories, no answers in a benchmark; 3 is no answer."""
    file, row = tmp_path / "rows.json", {k: v for k, v in ROW.items() if k != "answer"}
    text = json.dumps([ROW | {"category": ["Order", "Music"]}])
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    q, = read_questions(file)
    assert (q.category, q.answer, q.path) == ("Order, Music", "a", tmp_path / "x.wav")
    file.write_text(json.dumps([row]))
    q, = read_questions(file, "/r", needs=())
    assert (q.category, q.answer, q.path) == ("all", None, Path("/r/x.wav"))
    file.write_text(json.dumps([row | {"answer": 3}]))
    assert "'answer' is not a text: 3" in error_of(read_questions, file, needs=())


def test_clips_are_kept_within_bounds(model, tmp_path, monkeypatch):
    """There is room for one clip and a segment of it, not for another clip."""
    files, read = [tmp_path / "0.wav", tmp_path / "1.wav"], []
    monkeypatch.setattr(train_sft, "load_audio", lambda *a: read.append(a[0]) or load_audio(*a))
    clips = train_sft.Clips(model, keep_bytes=(2 + 10) * 32 * 4)
    for i, file in enumerate(files):
        file.write_bytes(make_data.wav_bytes(noise(1.0, i)))
    for file in files * 2:
        wave = load_audio(file)
        assert torch.equal(clips(file), model.hear([wave], True)[0])
        assert torch.equal(clips(file, 0.2, 0.6), model.hear([wave[3200:9600]])[0])
    assert (read.count(files[0]), read.count(files[1])) == (2, 4)


def test_described_clips(tmp_path):
    """Events come in order of time, and are long enough to be heard again."""
    events = [{"kind": k, "start_s": s, "end_s": s + 0.2, "pulses": 2}
              for s, k in enumerate("abcde")]
    how = train_sft.Settings(clips=str(tmp_path / "clips.jsonl"))
    row = {"audio_path": "a.wav", "A4_events": events[::-1]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row))
    assert train_sft.read_clips(how) == [(tmp_path / "a.wav", events, None)]
    events[2]["end_s"] = 2.1
    (tmp_path / "clips.jsonl").write_text(json.dumps(row))
    assert "row 1: 'A4_events' without" in error_of(train_sft.read_clips, how)


# ------------------------------------------------------------------------------------- checkpoints

def test_save_and_load_round_trip(model, qwen, whisper, tmp_path):
    for name, saved in (("tiny", model), ("qwen", pretrained(qwen[False], encoder=str(whisper)))):
        save(saved, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == saved.config and again.eos_ids == saved.eos_ids
        assert torch.equal(*(m.log_probs([dialogue(m)])[0] for m in (again, saved)))
        text = "<think>I look for the hum <seg>1.0, 2.0</seg>, the ✓"
        assert again.ids(text) == saved.ids(text)
    save(model, tmp_path / "tiny")  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen", "tiny"]
    (tmp_path / "tiny/echo.safetensors").write_bytes(b"half")
    assert "broken checkpoint" in error_of(load, tmp_path / "tiny")
    assert "no Echo checkpoint" in error_of(load, tmp_path)


# ------------------------------------------------------------------------- the scripts, end to end

STAGES = ("--encoder-steps 4 --encoder-clips 8 --caption-steps 3 --instruct-steps 3 "
          "--align-batch 2 --log-every 1 "
          "--sft-steps 80 --sft-batch 8 --sft-lr 2e-3")  # enough to write tags and answers
RL = "--steps 3 --questions 2 --group 4 --max-new-tokens 48 --eval-questions 3 --eval-every 2"


def sft(runs, out, flags="", *more):
    data = runs.parent / "data"
    return ["train_sft", "--data", data / "sft.jsonl", "--clips", data / "clips.jsonl",
            "--out", out, "--test", data / "test.jsonl", *STAGES.split(), *flags.split(), *more]


def rl(runs, out, flags="", *more):
    data = runs.parent / "data"
    return ["train_rl", "--model", runs / "sft", "--data", data / "rl.jsonl", "--out", out,
            "--test", data / "test.jsonl", *RL.split(), *flags.split(), *more]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    """The log of a run without what depends on the machine."""
    free = re.compile("seconds|decoding_share|.*_per_s|.*padding")
    return [{k: v for k, v in e.items() if not free.fullmatch(k)} for e in log_of(folder)]


def weights(folder):
    parts = ("echo.safetensors", "model.safetensors")
    return {k: v for part in parts for k, v in echo.load_file(folder / "model" / part).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def trained(data):
    """All stages at micro size, by the scripts: the folder of their folders."""
    runs = data.parent / "runs"
    good(*sft(runs, runs))
    good(*rl(runs, runs / "rl"))
    return runs


def test_logs_of_the_training_scripts(trained):
    logs = {run: log_of(trained / run) for run in ("encoder", "base", "sft", "rl")}
    steps = [e for e in logs["rl"] if "reward" in e]
    assert [e["step"] for e in steps] == [1, 2, 3]
    for e in steps:
        parts = e["format"] + e["consistency"] + e["accuracy"] + e["segment"]
        assert e["reward"] == pytest.approx(parts, abs=1e-4)
    assert max(e["segments"] for e in steps) > 0 and max(e["kl"] for e in steps) > 0
    evaluated = [e for e in logs["rl"] if "eval_accuracy" in e]
    assert [e["step"] for e in evaluated] == [0, 2, 3] and "eval_count_after" in evaluated[0]
    assert "eval_accuracy" in logs["sft"][-1]
    logged = {k for log in logs.values() for e in log for k in e} - {"step"}
    assert {generate.plain_name(k) for k in logged} <= generate.METRICS.keys() and len(logged) > 40
    assert all(math.isfinite(x) for log in logs.values() for e in log for x in e.values())


def test_each_stage_trains_its_own_parts(trained):
    assert (trained / "rl/report.html").is_file() and not (trained / "rl/saves").exists()
    encoder, *stages = (weights(trained / stage) for stage in ("encoder", "base", "sft", "rl"))
    for before, after in zip([encoder, *stages], stages):
        for name, x in before.items():  # the encoder is frozen after its own stage
            if name.startswith("encoder."):
                assert torch.equal(x, after[name]), name
        for name in ("projector.bias", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            assert not torch.equal(before[name], after[name]), name


def test_what_is_trained_already(trained, tmp_path):
    assert good(*sft(trained, trained)).count("already trained") == 3
    again = rl(trained, trained / "rl", "--save-every 7")
    assert "already trained" in good(*again)
    assert "was begun with lr = " in mistake(*again, "--lr", 1)
    shutil.copytree(trained / "base", tmp_path / "base")
    flags = sft(trained, tmp_path, "--stage sft --sft-steps 3")
    assert "nowhere: no such" in mistake(*flags, "--test", "nowhere", "--sft-batch", 2)
    good(*flags)  # nothing was trained, so that other settings are no mistake
    (tmp_path / "sft/mine.txt").write_text("")
    good(*flags, "--retrain", "--sft-steps", 2)
    assert [e["step"] for e in log_of(tmp_path / "sft")] == [1, 2, 2]
    assert (tmp_path / "sft/mine.txt").is_file()


def test_generate_on_a_foreign_clip(data, trained, tmp_path, monkeypatch):
    """Another rate, stereo: an answer in JSON, and the stream."""
    t = np.arange(3 * 44_100)[:, None] / 44_100
    raw = (8000 * np.sin(2 * np.pi * t * [300, 500])).astype("<i2").tobytes()
    (tmp_path / "my clip.wav").write_bytes(wav(raw, 44_100, 2))
    flags = ["generate", tmp_path / "my clip.wav", "Which sound?", "--choices", "bell", "a hiss",
             "--model", trained / "rl"]
    assert set(json.loads(good(*flags, "--json"))) == {"answer", "response", "segments", "ended"}
    said = good(*flags)
    assert "answer:" in said and "Which sound? bell, a hiss" in said and "(3.0 s)" in said
    monkeypatch.chdir(data.parent)  # without a clip: a held-out one of the toy
    assert "truth:" in good("generate")


@pytest.fixture
def benchmark(data, trained, tmp_path):
    """Five rows, and job(rows, output), which answers them two at once."""
    rows = [{"id": str(i), "question": r["question"], "choices": r["multi_choice"], "task": "sound",
             "answer": r["answer"], "audio_path": r["audio_path"]}
            for i, r in enumerate(echo.read_rows(data / "test.jsonl")[:5])]

    def job(rows, output):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return ["generate --batch 2 --temperature 1 --model", trained / "rl", "--audio-root", data,
                "--benchmark", tmp_path / "rows.json", "--output", output]
    return rows, job


def test_benchmark_rows_come_back_whole(benchmark, tmp_path):
    """With the evaluators' keys; what can't be answered is named and counted, and changes no other
    row's draws."""
    (rows, job), out = benchmark, tmp_path / "out.json"
    mmau = [{"audio_id" if k == "audio_path" else k: v for k, v in row.items()} for row in rows]
    good(*job(mmau, out))
    whole = json.loads(out.read_text())
    mmar = [row | {"modality": "x", "sub-category": "y"} for row in rows]
    mmar[2]["audio_path"], mmar[3]["question"] = "./audio/gone.wav", "q " * 60_000
    code, said, err = run(*job(mmar, out))
    assert code == 1 and "2 of 5 rows" in err and "gone.wav" in said and "shorten question" in said
    done = json.loads(out.read_text())
    for source, row, before in zip(mmar, done, whole, strict=True):
        assert source.items() <= row.items()
        answer = echo.extract_answer(row["response"]) or ""
        assert row["answer_prediction"] == row["model_output"] == answer
        assert row["response"] == ("" if "error" in row else before["response"])
    assert ["error" in row for row in done] == [False, False, True, True, False]


def test_an_interrupted_benchmark_goes_on(benchmark, tmp_path, monkeypatch):
    (rows, job), out, part = benchmark, tmp_path / "out.json", tmp_path / "out.json.part"
    job, read = job(rows, out), []
    good(*job)
    whole = json.loads(out.read_text())

    def interrupted(*args):  # Ctrl-C in the second batch
        read.append(args)
        if len(read) > 2:
            raise KeyboardInterrupt
        return load_audio(*args)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "load_audio", interrupted)
        assert run(*job)[0] == 130
    done = part.read_text().replace('"task": "sound"', '"task": "marked"')
    part.write_bytes((done + '{"id": "日').encode()[:-1])  # and a row cut within a letter
    assert "max_new_tokens" in mistake(*job, "--max-new-tokens", 9)
    good(*job, "--batch", 3)
    again = json.loads(out.read_text())
    assert [row["task"] for row in again] == ["marked"] * 2 + ["sound"] * 3
    assert [row["response"] for row in again] == [row["response"] for row in whole]
    assert not part.exists()


def test_interval_of_a_share():
    """The ends of Wilson's interval are the shares from which p is 1.96 standard errors away."""
    for right, n in ((0, 5), (5, 5), (0, 600), (600, 600), (413, 600)):
        (low, high), p = generate.interval(right, n), right / n
        assert 0 <= low <= p <= high <= 1 and math.copysign(1, low) == 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-6)


@pytest.mark.parametrize("command,says", [
    ("generate nowhere.wav q?", "nowhere.wav: no such file"),
    ("generate nowhere.wav", "no question"),
    ("generate --report nowhere", "no log.jsonl"),
    ("train_rl --steps many", "argument --steps: invalid int value: 'many'"),
    ("train_rl --reward nothing", "--reward nothing: must be one of"),
    ("train_rl --flat skip", "--flat skip: must be one of keep, drop"),
    ("train_rl --temperature 0", "must be above 0"),
    ("train_rl --questions 3 --mini-batches 2", "must be a multiple of"),
    ("train_sft --stage third", "--stage third: must be"),
    ("train_sft --first-listen-rate 3", "must divide 100"),
    ("train_sft --first-listen-rate 20", "at most 10"), ("train_sft --warmup 5", "at most 1"),
    ("generate --choices a b c.wav q", "they come last"),
    ("generate --limit 3", "--limit: needs --benchmark"),
    ("train_sft --train all --stage align", "--train all: must be"),
    ("train_sft --no-share-position --stage align", "with share_position = True, now"),
    ("train_sft --clips bare.jsonl --out new", "row 1: 'A4_events' without kind"),
    ("train_sft --clips few.jsonl --out new", "few.jsonl: 1 kinds of sound"),
    ("train_sft --decoder no/qwen --out new", "neither a folder here nor reachable"),
    ("train_sft --device cuda:9", "--device cuda:9"),
    ("make_data --qa-faults 2", "--qa-faults and --cot-faults")])
def test_a_users_mistake_is_one_line(trained, tmp_path, monkeypatch, command, says):
    """The flags that the mistake is not about are good ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(wav(b"\xff\x01" * 16_000))
    event = {"kind": "hum", "start_s": 0.0, "end_s": 1.0}
    for file, events in (("bare", [event]), ("few", [event | {"pulses": 2}])):
        Path(f"{file}.jsonl").write_text(json.dumps({"audio_path": "a.wav", "A4_events": events}))
    shutil.copytree(trained / "encoder", "runs/encoder")
    name, *flags = command.split()
    usual = {"make_data": ["make_data"], "generate": ["generate", "--model", trained / "rl"],
             "train_sft": sft(trained, "runs"), "train_rl": rl(trained, "rl")}[name]
    assert says in mistake(*usual, *flags)


def test_pretrained_stages_end_to_end(data, trained, qwen, whisper, tmp_path):
    """Both stages and use on the stand-ins, in bf16; what is frozen stays, but for its rounding."""
    bf16 = " --dtype bf16 --checkpointing --tokens-per-batch 900 --test none"
    flags = "--train last-1 --first-listen-rate 0 --sft-steps 2" + bf16
    said = good(*sft(trained, tmp_path, flags, "--decoder", qwen[True], "--encoder", whisper))
    assert "align_lr 5e-05" in said
    before, after = (weights(tmp_path / stage) for stage in ("encoder", "sft"))
    changed = {k for k in before if not torch.equal(before[k].bfloat16(), after[k].bfloat16())}
    assert any(".layers.2." in k for k in changed)
    assert all(re.search(r"layers\.2\.|model\.norm|projector", k) for k in changed)
    assert "Think step-by-step" in load(tmp_path / "sft").config.prompt
    (tmp_path / "rl.jsonl").write_text(json.dumps(echo.read_rows(data / "rl.jsonl")))  # a list
    good(*rl(trained, tmp_path / "rl", "--max-new-tokens 9" + bf16, "--model", tmp_path / "sft",
             "--data", tmp_path / "rl.jsonl", "--audio-root", data))
    said = good("generate --json --max-new-tokens 9 --choices a b --model", tmp_path / "rl",
                data / "audio/test/00000.wav", "What?")
    assert json.loads(said)["ended"]


# --------------------------------------------------------------------- kills and several processes

def killed(job, folder, number):
    """Send a signal to a job as soon as it has made a new save."""
    (name, *args), before = job, set(folder.glob("saves/step-??????"))
    script = process(f"{name}.py", *args)
    while not set(folder.glob("saves/step-??????")) - before:
        assert script.poll() is None, script.communicate()[1]
        time.sleep(0.01)
    script.send_signal(number)
    _, err = script.communicate()
    assert script.returncode == (130 if number == signal.SIGINT else -number), err


@pytest.mark.parametrize("name,start", [("sft", "base"), ("rl", "sft")])
def test_killed_and_run_again_ends_with_the_same_weights(trained, tmp_path, name, start):
    """SIGTERM, Ctrl-C and SIGKILL in the middle: the same command goes on and ends where the
    uninterrupted run ended."""
    jobs = []
    for out in (tmp_path / "whole", tmp_path / "killed"):
        shutil.copytree(trained / start, out / start)
        jobs.append({"sft": sft(trained, out, "--stage sft --sft-batch 2 --save-every 1"),
                     "rl": rl(trained, out / "rl", "--steps 15 --save-every 1")}[name])
    good(*jobs[0])
    folder = tmp_path / "killed" / name
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        killed(jobs[1], folder, number)
    (folder / "saves/step-999999.tmp").mkdir()  # as a kill in the middle of a save and of a line
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 9')
    good(*jobs[1])
    assert equal(weights(tmp_path / "whole" / name), weights(folder))
    assert untimed(tmp_path / "whole" / name) == untimed(folder)


@pytest.mark.parametrize("limit,says", [(100_000, "step-000001: can't be written"), (99, "")])
def test_a_full_disk_is_one_line(trained, tmp_path, limit, says):
    """No file may grow beyond `limit` bytes; afterwards the same command goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    job = rl(trained, tmp_path / "rl", "--save-every 1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert says in mistake(*job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("rl/saves/*.tmp"))
    good(*job)
    assert equal(weights(tmp_path / "rl"), weights(trained / "rl"))


SCRIPTED = """import json, sys
sys.path.insert(0, sys.argv[1])
import torch, echo, train_rl, train_sft
torch.optim.AdamW = lambda groups, lr, **_: torch.optim.SGD(groups, lr)
torch.nn.utils.clip_grad_norm_ = lambda parameters, _: torch.ones(())

def sample_tokens(model, hidden, rows, temperature):
    logp, tokens = model.decoder.lm_head(hidden).log_softmax(-1), []
    for row in rows:
        n = row.draws.initial_seed() % 3 if temperature else 0
        said = "<think><seg>0, 1</seg> a" + ("</think><answer>two</answer>", "<seg>1, 2", "")[n]
        tokens.append([*model.ids(said), model.tokenizer.eos_token_id][len(row.logprobs)])
    return tokens, [logp[k, token].item() for k, token in enumerate(tokens)]
echo.sample_tokens = sample_tokens
for sys.argv in json.loads(sys.argv[2]):
    {"train_sft": train_sft, "train_rl": train_rl}[sys.argv[0]].run()
"""


def test_two_processes_equal_one(trained, tmp_path):
    """The same global batch on one and on two gloo processes: the same log and the same weights.
    Responses are scripted and the optimiser is plain SGD: a draw between two tokens and Adam's
    first steps, which are signs, would make much of a rounding."""
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    for n in (1, 2):
        out = tmp_path / str(n)
        shutil.copytree(trained / "base", out / "base")
        jobs = [sft(trained, out, "--stage sft --sft-steps 1 --sft-lr 0.1"),
                rl(trained, out / "rl", "--steps 1 --questions 4 --lr 0.01")]
        script = process("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
                         tmp_path / "scripted.py", HERE, json.dumps(jobs, default=str))
        _, err = script.communicate()
        assert script.returncode == 0, err[-2000:]
    for name, start in (("sft", "base"), ("rl", "sft")):
        before, one, two = (weights(folder) for folder in (
            trained / start, tmp_path / "1" / name, tmp_path / "2" / name))
        apart, learned = (sum(((w[k] - one[k]) ** 2).sum() for k in one) for w in (two, before))
        assert apart < 1e-3 * learned and learned > 1e-6
        for a, b in zip(*(untimed(tmp_path / n / name) for n in "12"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=3e-5)


# ------------------------------------------------------------------------ pages, in a real browser

@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium over WebDriver: browser(page, script, result, seconds) -> what `result`
    is so many seconds after the script."""
    if not shutil.which("chromedriver"):
        pytest.skip("no Chromium with chromedriver here: apt-get install chromium-driver")
    port = 20_000 + os.getpid() % 20_000
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(path, body, method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/session{path}", method=method,
                                         data=json.dumps(body).encode())
        return json.load(no_proxy.open(request, timeout=60))["value"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu",
             "--autoplay-policy=no-user-gesture-required",
             f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    wanted, session = {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}, None
    while not session:
        assert driver.poll() is None
        with contextlib.suppress(OSError):  # not yet listening
            session = "/" + call("", {"capabilities": wanted})["sessionId"]

    def open_page(page, script, result, seconds=0.0):
        call(session + "/url", {"url": Path(page).as_uri()})
        call(session + "/execute/sync", {"script": script, "args": []})
        time.sleep(seconds)
        return call(session + "/execute/sync", {"script": "return " + result, "args": []})
    yield open_page
    call(session, {}, "DELETE")
    driver.terminate()


HOSTILE = "<script>document.title='pwned'</script><img src=x onerror='document.title=1'>&amp;"


@pytest.fixture
def trace(trained, tmp_path, write):
    """The page of a response full of hostile text, in which one segment is heard."""
    said = f"{HOSTILE} <seg>0.5, 1.5</seg> it <seg>9, 10</seg> {HOSTILE}"
    write(load(trained / "rl"), [f"<think>{said}</think><answer>hum</answer>"])
    (tmp_path / "clip.wav").write_bytes(make_data.wav_bytes(noise(3.0)))
    good("generate --max-new-tokens 300 --html", tmp_path / "trace.html", "--model", trained / "rl",
         tmp_path / "clip.wav", HOSTILE, "--choices", "hum", HOSTILE)
    return tmp_path / "trace.html"


def test_pages_are_self_contained_and_escape_text(trace):
    page = trace.read_text()
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page and not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_attention_on_what_was_heard(model, write):
    """On the first listen at every step, on a segment from its insertion on."""
    write(model, TEXTS)
    row, = respond(model, [noise(3.0)])
    shares = generate.attention_shares(model, row)
    assert shares.shape == (len(row.logprobs), 2) and (shares.sum(1) <= 1 + 1e-5).all()
    closed = len(model.ids(TEXTS[0].partition("</seg>")[0] + "</seg>"))
    first, again = shares.T > 0
    assert first.all() and not again[:closed].any() and again[closed:].all()


def test_a_chip_plays_its_segment_and_hostile_text_stays_text(trace, browser):
    title, started, stopped, later, text = browser(trace, """
        const player = document.querySelector('audio'); window.seen = [document.title];
        player.addEventListener('playing', () => seen.push(player.currentTime));
        player.addEventListener('pause', () => seen.push(player.currentTime));
        document.querySelector('button.chip').click();
        """, "[...seen, document.title, document.body.innerText]", 4.0)
    assert title == later == "Echo: a trace" and HOSTILE in text and "outside the clip" in text
    assert abs(started - 0.5) < 0.3 and abs(stopped - 1.5) < 0.3


def test_report_and_index_in_a_browser(data, trained, tmp_path, browser):
    good("generate --report", trained / "rl", "--against", trained / "sft")
    charts, text = browser(trained / "rl/report.html", "",
                           "[document.querySelectorAll('svg').length, document.body.innerText]")
    assert charts > 15 and generate.METRICS["kl"] in text
    charts, left = "", "[...document.querySelectorAll('svg text')].map(t => t.getBBox().x)"
    for y in (7.8e-4, 1.234e-4, -3.21e-5, 5432.1):
        charts += generate.chart([("run", "red", [(0, y / 3), (9, y)], False)], "step", 320, 150)
    generate.page(tmp_path / "charts.html", "charts", charts)
    assert min(browser(tmp_path / "charts.html", "", left)) >= 0  # no label is cut
    good("generate --benchmark", data / "test.jsonl", "--model", trained / "rl",
         "--html", tmp_path / "index.html")
    shown = "[...document.querySelectorAll('details')].filter(d => !d.hidden).length"
    pick = """const kind = document.getElementById('kind'); kind.value = 'order';
              kind.dispatchEvent(new Event('change'))"""
    assert [browser(tmp_path / "index.html", x, shown) for x in ("", pick)] == [6, 2]


# ------------------------------------------------------------- python test_echo.py: measurements

def seconds(call, repeat=5):
    """The median of some timings, after a first call that is not counted."""
    took = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[repeat // 2]


def probe(model, clips):
    """What a small network reads of the number of pulses from a sound's tokens."""
    tokens, pulses, rate = {"first-listen": [], "full-rate": []}, [], model.config.first_listen_rate
    for clip in clips:
        wave = load_audio(Path("data") / clip["audio_path"])
        first = model.hear([wave], True)[0]
        for e in clip["A4_events"]:
            place = e["start_s"], e["end_s"]
            tokens["first-listen"].append(echo.cut(first, *place, rate or 25).flatten())
            tokens["full-rate"].append(model.hear([echo.cut(wave, *place)])[0].flatten())
            pulses.append(e["pulses"])
    y, n = torch.tensor(pulses), len(pulses) * 4 // 5  # the last fifth is not trained on
    for name, x in tokens.items():
        x = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 128), torch.nn.GELU(),
                                  torch.nn.Linear(128, 7))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(300):
            i = torch.randint(n, (128,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        right = (net(x[n:]).argmax(1) == y[n:]).float().mean()
        print(f"number of pulses read from {name} tokens: {right:.1%} of {len(y) - n} (chance 20%)")


def one_by_one(model, prompt, wave, seed, n_tokens):
    """The published scheme: a row at a time, the whole of it prefilled again after each segment."""
    row, since = Rollout(prompt.copy(), wave, torch.Generator().manual_seed(seed)), 0
    while not row.ended:
        if not since:
            cache = echo.Cache(config=model.decoder.config)
            cache.dtype = torch.bfloat16 if model.bf16 else torch.float32
        ids, position, _, audio = model.tensors([row.sample], [since])
        since = len(row.sample.ids)
        hidden = model.hidden(ids, position, torch.ones(1, since).long(), audio, cache)[:, -1]
        (token,), (logp,) = echo.sample_tokens(model, hidden, [row], 1.0)
        echo.add_token(model, row, token, logp, "interleaved", n_tokens)
        if row.waiting:
            echo.listen_again(model, [row], "segment")
            since = 0
    return row.sample.ids


@torch.no_grad()
def decoding_speed(model, prompts, waves, n_tokens):
    """64 rollouts against one by one and against transformers' generate, and the sampler's cost."""
    def batched(**more):
        return rollouts(model, prompts, waves, 8, **more)
    rows, alone = batched(max_new_tokens=n_tokens), []
    together = seconds(lambda: batched(max_new_tokens=n_tokens), 3)
    began = time.perf_counter()
    with model.autocast():
        for i in range(8):
            alone.append(one_by_one(model, prompts[i], waves[i], 8 * i, n_tokens))
    ratio = 8 * (time.perf_counter() - began) / together
    as_one = sum(ids == row.sample.ids for ids, row in zip(alone, rows[::8]))
    print(f"64 interleaved rollouts against one by one with re-prefill: {ratio:.1f} times the "
          f"responses a second ({64 / together:.1f}); same ids in {as_one} of 8")
    ids, _, mask, audio = model.tensors([p for p in prompts for _ in range(8)])
    (x, eos), model.eos_ids = (model.embed(ids, audio), model.eos_ids), set()
    ours = seconds(lambda: batched(reasoning="text", temperature=0.0, max_new_tokens=40), 3)
    with model.autocast():
        theirs = seconds(lambda: model.decoder.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, min_new_tokens=40,
            max_new_tokens=40, pad_token_id=0), 3)
        sampler = seconds(lambda: echo.sample_tokens(model, x[:, -1], rows, 1.0))
    model.eos_ids = eos
    print(f"64 rows of 40 tokens against transformers' generate: {theirs / ours:.2f} times its "
          f"speed; a step takes {25 * ours:.1f} ms, its sampling {1000 * sampler:.1f} ms")
    return rows


def training_speed(model, samples):
    ids, _, mask, _ = model.tensors(samples)

    def bare():
        with model.autocast():
            model.decoder(inputs_embeds=model.embed(ids, None), attention_mask=mask,
                          labels=ids.where(ids >= 0, -100)).loss.backward()
    ours, theirs = seconds(lambda: (-model(samples).mean()).backward()), seconds(bare)
    print(f"a training step of {int(mask.sum())} tokens against a bare forward and backward of the "
          f"decoder: {theirs / ours:.2f} times its speed ({ours:.2f} s)")


def memory(policy, reference, samples, cached):
    """What a GRPO step holds, by part, as it is allocated; `cached`: positions in the KV cache."""
    def size(tensors):
        return sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 1e9
    kept, weights, config = [], list(policy.parameters()), policy.decoder.config
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        policy(samples)
    trained = size(p for p in weights if p.requires_grad)
    head = config.hidden_size // config.num_attention_heads
    numbers = 2 * cached * config.num_hidden_layers * config.num_key_value_heads * head
    parts = {"trained weights": trained, "frozen weights": size(weights) - trained,
             "gradients": trained, "AdamW": 2 * trained, "reference": size(reference.parameters()),
             f"kept for the backward pass of {sum(len(s.ids) for s in samples)} tokens":
                 size(kept + weights) - size(weights),
             "3 arrays of logits": 12 * policy.LOGITS_AT_ONCE / 1e9,
             "KV cache": numbers * (2 if policy.bf16 else 4) / 1e9,
             "peak of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    print("GB: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items()))


def measure(folder="runs/rl"):
    model, questions = load(folder), read_questions("data/test.jsonl")[:8]
    policy = echo.prepare(load(Path(folder).parent / "sft"), train_rl.Settings())
    echo.prepare(model, train_rl.Settings(train="none"))
    n_tokens, every = (100, 2) if model.config.decoder == "tiny" else (40, 8)
    probe(model, echo.read_rows("data/clips.jsonl")[:1500])
    waves, prompts = [load_audio(q.path) for q in questions], []
    for features, q in zip(model.hear(waves, True), questions):
        prompts.append(model.prompt(features, q.question, q.choices))
    rows = decoding_speed(model, prompts, waves, n_tokens)
    with pytest.MonkeyPatch.context() as patch:
        passes = watch_passes(patch, model)
        rollouts(model, prompts, waves, 8, max_new_tokens=n_tokens)
    samples = [row.sample for row in rows[::every]]
    training_speed(policy, samples)
    memory(policy, model, samples, max(mask.numel() for mask, _ in passes))


if __name__ == "__main__":
    measure(*sys.argv[1:])
