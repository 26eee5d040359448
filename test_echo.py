"""pytest -q: each test compares with a trusted reference, a plain loop or hand-computed values."""
# SPDX-License-Identifier: MIT
import base64
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel)

import echo
import generate
import make_data
import train_rl  # noqa: F401
import train_sft
from echo import (AUDIO, GRPO, Config, EchoError, Rollout, Sample, Segment, cut, load,
                  parse_segment, rollouts, save)
from make_data import load_audio, read_questions, read_rows, wav_bytes

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
HERE = Path(__file__).parent
Asked = namedtuple("Asked", "question choices answer")
torch.set_num_threads(1)  # quick for micro models, and other processes round alike


def run(command, *args, encoding="utf-8"):
    """Run "script --flag ..." and more flags in this process: exit code, stdout, stderr."""
    name, *flags = command.split()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    argv = mock.patch.object(sys, "argv", [name, *flags, *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as end:
        echo.main(sys.modules[name].run)
    return end.value.code or 0, *(text.seek(0) or text.read() for text in (out, err))


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
    with pytest.raises((EchoError, OSError)) as error:
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


def micro(tokenizer, listener=None, **config):
    torch.manual_seed(0)
    decoder = train_sft.tiny_decoder(len(tokenizer), dim=48, layers=2)
    return echo.Echo(Config(**config), listener or echo.SmallEncoder(32, 1), decoder, tokenizer)


@pytest.fixture(scope="session")
def model(data):
    texts = [f" {r['question']} Choose from {r['cot']}" for r in read_rows(data / "sft.jsonl")]
    return micro(train_sft.tiny_tokenizer(texts * 2))


def within(model, n):
    """The same model, with another limit of new tokens."""
    model = copy.copy(model)
    model.config = replace(model.config, max_new_tokens=n)
    return model


# ------------------------------------------------------------------------------------------- audio
def wav(raw, rate=16_000, channels=1, bits=16, coding=1, says=None):
    block, size = channels * bits // 8, len(raw) if says is None else says
    header = struct.pack("<HHIIHH", coding, channels, rate, rate * block % 2 ** 32, block, bits)
    if coding == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: 24 bytes more, the coding among them
        header += struct.pack("<HHIH14x", 22, bits, 0, 1)
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header
    body += b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(body) + len(raw)) + body + raw


LIST = b"LIST\4\0\0\0INFO"  # a chunk


@pytest.mark.parametrize("bits,coding", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (24, 0xFFFE)])
@pytest.mark.parametrize("channels,rate", [(1, 16_000), (2, 44_100), (3, 8_000)])
def test_wav_formats(tmp_path, bits, coding, channels, rate):
    loudness = (np.arange(channels) + 1) / channels
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)[:, None] * loudness
    ints = (wave * (2 ** (bits - 1) - 1)).round().astype("<i4") + 128 * (bits == 8)
    raw = wave.astype("<f4") if coding == 3 else ints[..., None].view(np.uint8)[..., :bits // 8]
    for says, tail in ((None, b""), (0, b""), (0, LIST), (0xFFFF_FFFF, LIST)):  # 0: a stream's
        content = wav(raw.tobytes() + tail, rate, channels, bits, coding, says)
        (tmp_path / "a.wav").write_bytes(content)
        got, t = load_audio(tmp_path / "a.wav"), np.arange(16_000) / 16_000
        gap = got[:16_000].numpy() - (0.5 * np.sin(2 * np.pi * 440 * t) * loudness.mean())
        assert len(got) == 16_000 and np.abs(gap[800:15_000]).max() < 0.02


@pytest.mark.parametrize("content,says", [
    (b"ID3\x03" + b"\0" * 100, 'convert or cut it: ffmpeg -i "a.wav" -ar 16000 "a-16k.wav"'),
    (b"version https://git-lfs.github.com/spec/v1", "not a WAV file, it begins with b'version '"),
    (wav(b"\0" * 8) + b"data\4\0\0\0\1\1\1\1", "two parts"),
    (wav(b""), "empty"), (wav(b"\0" * 50, says=100), "50 of 100 bytes"),
    (b"RIFF\x10\0\0\0WAVEjunk\0\0\0\0", "not a WAV file"),
    (wav(b"\0" * 4, coding=7, bits=8), "coding 7 with 8 bits"),
    (wav(b"\0" * 9, rate=16_001), "16001 Hz"), (wav(b"\0" * 9, rate=767_957), "767957 Hz"),
    (wav(b"\0" * 2 ** 17, rate=1_000 // 60), "16 Hz"),
    (wav(b"\0" * 2_000, rate=1_000, channels=0), "0 channels"),
    (wav(b"\1" * 3_700_000, rate=1_000, bits=8), "longer than 3600 s"),
    (wav(LIST, says=0), "empty"), (wav(LIST + LIST, says=0), "empty"),  # no samples
    (wav(struct.pack("<2f", math.nan, 0), bits=32, coding=3), "NaN"),
    (wav(struct.pack("<2f", 5337, 0), bits=32, coding=3), "far beyond -1 to 1"),
    (wav(struct.pack("<4h", 900, -900, 70, -70), channels=2), "cancel each other")])
def test_broken_audio_is_one_line(tmp_path, content, says):
    (tmp_path / "a.wav").write_bytes(content)
    error = error_of(load_audio, tmp_path / "a.wav")
    assert says in error and "a.wav" in error


# ------------------------------------------------------------------------------- encoder and model
def test_a_thumbnail_lacks_the_detail(model):
    """Two clips that differ in the number of pulses alone."""
    tone, clips = np.sin(2 * np.pi * 900 * np.arange(16_000) / 16_000), []
    for n in (2, 6):
        clips.append(0.1 * noise(6.0, 1))
        pulses = 0.1 * tone * make_data.pulse_train(n, 16_000, 0.004)
        clips[-1][32_000:48_000] += torch.tensor(pulses)
    (two, six), (full_two, full_six) = model.hear(clips, first_listen=True), model.hear(clips)
    assert (two - six).abs().max() < 0.2 * (full_two - full_six).abs().max()


def dialogue(model, seed=0, seconds=3.0):
    """A prompt, some text, a re-listened segment, more text and eos."""
    wave = noise(seconds, seed)
    sample = model.prompt(model.hear([wave], True)[0], "How many pulses?", ["two", "three"])
    sample.add(model.tokenize("<think>I look for the hum <seg>0.5, 1.5</seg>"), trained=True)
    sample.add_audio(model.hear([wave[8000:24_000]])[0])
    return model.add_response(sample, " the hum has two pulses.</think><answer>two</answer>")


def test_log_probs_equal_a_plain_pass(model):
    """In a batch, too: tokens at 0, 1, 2, ... and no padding; audio has no loss, eos has one."""
    samples, want = [dialogue(model, i, 2.0 + i / 4) for i in range(6)], []
    for s in samples:
        x = model.decoder.get_input_embeddings()(torch.tensor(s.ids).clamp_min(0))
        x[np.less(s.ids, 0)] = model.projector(torch.stack([*filter(torch.is_tensor, s.audio)]))
        logp = (model.decoder(inputs_embeds=x[None]).logits[0] / 0.7).log_softmax(-1)
        want += [logp[t - 1, s.ids[t]].item() for t in range(len(s.ids)) if s.trained[t]]
        assert not any(on for i, on in zip(s.ids, s.trained) if i == AUDIO)
        assert s.trained[-1] and s.ids[-1] == model.tokenizer.eos_token_id
    got = model(samples, 0.7)
    assert [len(logp) for logp in got] == [sum(s.trained) for s in samples]
    assert torch.cat(got).tolist() == pytest.approx(want, abs=1e-4)
    loss, n = echo.sft_loss(model, samples), len(want)
    assert loss.item() == pytest.approx(-torch.cat(model(samples)).mean().item(), abs=1e-5)
    parts = echo.sft_loss(model, samples[:1], n) + echo.sft_loss(model, samples[1:], n)
    assert parts.item() == pytest.approx(loss.item(), abs=1e-5)  # in micro-batches, too


def spelled(model, ids):
    """Ids as text, [audio] for audio."""
    out = ""
    for is_audio, some in itertools.groupby(ids, lambda i: i == AUDIO):
        out += "[audio]" * len(list(some)) if is_audio else model.tokenizer.decode(list(some))
    return out


def test_prompt_writes_times_and_holds_any_text(model):
    full = micro(model.tokenizer, thumbnail=False)
    any_text = 'what is <|end|> or <seg>1, 2</seg>, Ünï ✓ 日本 "<b>&amp;</b>" {0} {choices}?'
    prompt = model.prompt(torch.zeros(3, 32), any_text, ["{question}", "a, b"])
    said = f' {any_text} Choose from ["{{question}}", "a, b"].\n'
    assert spelled(model, prompt.ids) == "[audio]0.0[audio]0.5[audio]1.0 1.5" + said
    assert prompt.ids.count(AUDIO) == sum(map(torch.is_tensor, prompt.audio)) == 3
    assert model.tokenizer.eos_token_id not in prompt.ids  # though its text is there
    assert spelled(model, model.prompt([], "Why?").ids) == " Why?\n" and not any(prompt.trained)
    prompt = full.prompt(torch.zeros(25 * 101 + 2, 32), "Why?")  # at each second's first token
    second = "".join(f"[audio]{s}.0" + "[audio]" * 24 for s in range(101))
    assert spelled(full, prompt.ids) == second + "[audio]101.0[audio] 101.1 Why?\n"


# -------------------------------------------------------------------------------------------- tags
@pytest.mark.parametrize("text,want", [
    ("2.0, 3.0", (2, 3, None)), ("2,3", (2, 3, None)), (" 2.5 , 3 ", (2.5, 3, None)),
    (".5, 1.", (0.5, 1, None)), ("2.0, 2.2", (2, 2.2, None)), ("9.97, 39.97", (9.97, 39.97, None)),
    ("9, 39.97", (9, 39.97, "too long")), ("38.0, 40.4", (38, 39.97, None)),
    ("38, 40.5", (38, 40.5, "outside the clip")), ("0, 600", (0, 600, "outside the clip")),
    ("3, 2", (3, 2, "reversed")), ("2.0, 2.1", (2, 2.1, "too short")),
    *((bad, (None, None, "malformed")) for bad in (
        "1.2.3, 4", "-1, 2", "1", "1, 2, 3", "", "a, b", "1e3, 2e3", "nan, inf", "2s, 3s",
        "0:01, 0:02", "٣, ٤"))])
def test_segment_tags(text, want):
    got = parse_segment(f"<seg>{text}</seg>", 39.97)
    assert (got.start_s, got.end_s, got.refused) == want
    assert parse_segment("<seg>2, 3</seg>", 39.97, turns=8).refused == "too many turns"


# ---------------------------------------------------------------------------------------- decoding
def asked(n):
    """Questions, no two alike."""
    return [Asked("Which comes first?" + " Which?" * i, ["hum", "bell"], "hum") for i in range(n)]


def respond(model, waves, questions=None, seeds=None, **more):
    return rollouts(model, questions or asked(len(waves)), waves,
                    seeds=seeds or range(len(waves)), **more)


@pytest.fixture
def write(monkeypatch):
    """write(model, texts): make the row with seed i write texts[i], by replacing what is sampled
    and nothing else."""
    def write(model, texts):
        ids = [[*model.tokenize(text), model.tokenizer.eos_token_id] for text in texts]

        def sample_tokens(logits, rows, temperature):
            logp = (logits / (temperature or 1.0)).log_softmax(-1)
            seeds = [np.ravel(row.draws.bit_generator.seed_seq.entropy)[-1] for row in rows]
            tokens = [ids[seed % len(ids)][len(row.logprobs)] for seed, row in zip(seeds, rows)]
            return tokens, [logp[k, token].item() for k, token in enumerate(tokens)]
        monkeypatch.setattr(echo, "sample_tokens", sample_tokens)
    return write


def test_limits_are_the_models_and_count_what_is_heard(model, write):
    """Refused tags take no turn, the limits are not the defaults, and text reasoning says so."""
    text = "<seg>9, 9.5</seg> a <seg>0, 0.1</seg> b <seg>0, 1</seg> c <seg>1, 2</seg> d"
    other = within(model, 100)
    other.config = replace(other.config, max_turns=2, min_segment_s=0.05)
    write(other, [text])
    refused = [None, None, "too many turns"]
    for listen, want in ((cut, refused), (None, ["text reasoning"] * 3)):
        row, = respond(other, [noise(3.0)], listen=listen)
        assert [s.refused for s in row.segments] == ["outside the clip", *want]


def test_a_token_may_close_two_tags(model):
    """Then both are heard, in their order."""
    ids = model.tokenize("<seg>0, 1</seg><seg>1, 1.4</seg>")
    pieces = {1: "<seg>0, 1", 2: "</seg><seg>1, 1.4</seg> x"}
    with mock.patch.object(type(model.tokenizer), "decode",
                           lambda self, ids, **_: "".join(pieces[i] for i in ids)):
        row = Rollout(Sample(), noise(2.0), None)
        for token in (1, 2):
            echo.add_token(model, row, token, 0.0, cut)
    assert ids and len(row.heard_segments) == len(row.waiting) == 2
    echo.listen_again(model, [row], cut)
    assert row.sample.ids == [1, 2] + [AUDIO] * 35 and not row.waiting


TEXTS = ["<think>a <seg>0.5, 1.5</seg> b. Then <seg>1.0, 2.0</seg> c</think><answer>hum</answer>",
         "<think>look <seg>9, 10</seg> a <seg>1, 0</seg> b <seg>x</seg> c</seg> d</think>",
         "<answer>two Ünïcode ✓ 日本</answer>",
         "<think><seg> <seg>0, 1</seg><seg>3.5, 6.1</seg> both</think><answer>bell</answer>"]


def test_interleaved_rollout_hears_the_right_part_and_matches_training(model, write):
    """Batched, cached, waiting rows: log-probs are those of a plain uncached pass over the ids."""
    waves = [noise(3.0 + i, i) for i in range(4)]
    write(model, TEXTS)
    rows = respond(within(model, 200), waves, temperature=0.7)
    assert [r.text for r in rows] == TEXTS
    assert echo.extract_answer(rows[2].text) == "two Ünïcode ✓ 日本"
    bad = ["outside the clip", "reversed", "malformed", "malformed"]
    assert [[s.refused for s in r.segments] for r in rows] == [[None] * 2, bad, [], [None] * 2]
    places = [[(8000, 24_000), (16_000, 32_000)], [], [], [(0, 16_000), (56_000, 96_000)]]
    for r, wave, heard in zip(rows, waves, places):
        again = [*filter(torch.is_tensor, r.sample.audio[r.sample.trained.index(True):])]
        want = [x for start, end in heard for x in model.hear([wave[start:end]])[0]]
        assert len(again) == len(want)
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(again, want))
        assert r.ended == "eos" and sum(r.sample.trained) == len(r.logprobs)
        assert (model([r.sample], 0.7)[0] - torch.tensor(r.logprobs)).abs().max() < 1e-4


def test_rows_wait_for_each_other(model, write, monkeypatch):
    """8 rows with 0 to 7 segments: each as alone; audio comes for all who wait at once."""
    texts = ["".join(" the hum" * (20 if (i + k) % 8 == 7 else 1) + "<seg>0, 0.2</seg>" * (k < i)
                     for k in range(i + 1)) for i in range(8)]
    waves, questions = [noise(2.0, i // 2) for i in range(8)], asked(8)
    write(model, texts)
    long, passes = within(model, 200), []
    hidden = long.hidden
    monkeypatch.setattr(long, "hidden", lambda *a: passes.append(a[0].shape[1]) or hidden(*a))
    rows = respond(long, waves, questions, temperature=0.7)
    assert sum(width > 1 for width in passes) == 1 + 7  # the prompts; audio, once for all who ask
    for i, row in enumerate(rows):
        alone, = respond(long, [waves[i]], [questions[i]], [i], temperature=0.7)
        assert row.text == texts[i] and len(row.heard_segments) == i
        assert row.sample.ids == alone.sample.ids  # eos, too
        assert row.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_inserted_audio_changes_what_follows_and_controls_differ(model, write):
    wave, after = noise(3.0), set()
    closed = len(model.tokenize(TEXTS[0].partition("</seg>")[0] + "</seg>"))
    write(model, TEXTS)
    for name, listen in generate.LISTEN.items():
        row, = respond(model, [wave], listen=listen)
        inserted = row.sample.ids[row.sample.trained.index(True) + closed:][:25] == [AUDIO] * 25
        assert inserted == bool(row.heard_segments) == (name != "nothing")
        after.add(tuple(row.logprobs[closed:closed + 3]))
    assert len(after) == 4
    ramp = torch.arange(96_000.0)
    assert torch.equal(generate.silence(ramp, 5.0, 6.0), torch.zeros(16_000))
    assert torch.equal(generate.elsewhere(ramp, 5.0, 6.0), torch.arange(32_000.0, 48_000.0))
    row, = respond(within(model, closed), [wave])
    assert (row.ended, row.segments[0].refused) == ("length", "at the limit of tokens")
    assert row.sample.ids[-1] != AUDIO


def test_sampling_is_the_softmax_and_a_row_draws_for_itself(model):
    fresh = [rollouts(within(model, 30), asked(1), [noise(2.0)])[0].sample.ids for _ in range(2)]
    assert fresh[0] != fresh[1]  # no seed
    logits, n = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.9]), 4000  # draws against the softmax itself
    p = logits.softmax(-1)
    rows = [Rollout(Sample(), None, np.random.default_rng(i)) for i in range(n)]
    tokens, logp = echo.sample_tokens(logits.repeat(n, 1), rows, 1.0)
    shares = torch.bincount(torch.tensor(tokens), minlength=5) / n
    assert ((shares - p).abs() < 5 * (p / n).sqrt() + 1e-3).all()
    assert logp == pytest.approx(p.log()[tokens].tolist(), abs=1e-5)
    waves, short = [noise(2.0 + i, i) for i in range(4)], within(model, 30)
    for i, row in enumerate(respond(short, waves)):  # the same alone as in a batch
        assert row.sample.ids == respond(short, [waves[i]], [asked(4)[i]], [i])[0].sample.ids
    assert "not numbers" in error_of(echo.sample_tokens, logits[None] * math.nan, rows[:1], 1.0)


def test_greedy_equals_transformers_generate(model):
    wave, (question,) = noise(2.0), asked(1)
    ours, = respond(within(model, 20), [wave], listen=None, temperature=0.0)
    prompt = model.prompt(model.hear([wave], True)[0], question.question, question.choices)
    x, mask = model.embed([prompt])
    theirs = model.decoder.generate(
        inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=20,
        eos_token_id=model.tokenizer.eos_token_id, pad_token_id=0)[0].tolist()
    assert ours.sample.sampled == theirs


# -------------------------------------------------------------------------------- rewards and GRPO
GOOD = "<think>a <seg>1, 2</seg> the hum.</think><answer>hum</answer>"


@pytest.mark.parametrize("text,heard,parts", [
    (GOOD, 1, (0.5, 0, 0.5, 0.5)), (GOOD, 0, (0.5, 0, 0.5, 0)), ("", 0, (0, 0, 0, 0)),
    (GOOD.replace("hum</answer>", "bell</answer>"), 1, (0.5, 0, 0, 0)),
    (GOOD.replace("</seg> the", "</seg> The"), 1, (0.5, -0.1, 0.5, 0.5)),    # behind a space, too
    (GOOD.replace("</seg> the", "</seg>The"), 1, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> the hum.", "</seg>."), 1, (0.5, -0.1, 0.5, 0.5)),  # no word said
    (GOOD.replace("</seg> the", "</seg>, the"), 1, (0.5, 0, 0.5, 0.5)),
    (GOOD.replace("</seg> the", "</seg>. The"), 1, (0.5, 0, 0.5, 0.5)),
    (GOOD.replace(" the hum.", "<seg>1, 2</seg>" * 6), 7, (0.5, -0.5, 0.5, 0.5)),
    ("a <seg>1, 2</seg>", 1, (0, -0.1, 0, 0)), ("<think>a</think> hum", 0, (0, 0, 0, 0)),
    ("<think>a</think><answer>Hum.</answer>", 0, (0.5, 0, 0.5, 0)),
    ("<think>a</think><answer>hum</answer><answer>bell</answer>", 0, (0, 0, 0, 0)),
    ("<answer>hum</answer><think>a</think>", 0, (0, 0, 0.5, 0)),
    ("<think>a<think>b</think><answer>hum</answer>", 0, (0, 0, 0.5, 0))])
def test_rewards_by_hand(text, heard, parts):
    segments = [Segment("1, 2", 1, 2, heard=True)] * heard + [Segment("x", refused="malformed")]
    got = echo.paper_reward(Rollout(Sample(), None, None, segments=segments, text=text), *asked(1))
    assert list(got) == ["format", "consistency", "accuracy", "segment"]
    assert got == pytest.approx(dict(zip(got, parts)))


@pytest.mark.parametrize("said,choices,want", [
    ("5 dB", [".5 dB", "5 dB"], "5 dB"), (".5 dB", ["5 dB", "7 dB"], None),
    ("6'", ["6", "6'"], "6'"), ("6'", ["6", "7"], None), ("!", ["?", "!"], "!"),
    ("Hum.", ["hum"], "hum"), (".", ["?", "a"], None),
    (" 'the  HUM'; ", ["the hum", "hum"], "the hum"), ("a", ["A", "a."], "A"), ("", ["a"], None),
    ("a.", ["A", "a", "b"], None), ("b?", ["b!", "b"], None), ("a", ["a", "b", "a"], "a"),
    ('"Two."', ["two", "ten"], "two"), ("'.5 dB.'", ["5 dB", ".5 dB"], ".5 dB")])
def test_what_counts_as_the_answer(said, choices, want):
    """The nearest way of comparing that fits decides, if it fits one choice alone."""
    assert echo.find_choice(said, choices) == want


SAME = {}  # a reward may return one object each time


@pytest.mark.parametrize("returned,says", [
    (lambda i: {"x": math.nan if i == 1 else 1.0}, "finite"), (lambda i: {"x": None}, "finite"),
    (lambda i: {"x": 1.0, "y": 2.0} if i else {"x": 1.0}, "the same names"),
    (lambda i: {}, "names"), (lambda i: 1.0, "names"), (lambda i: {"x": "a"}, "finite"),
    (lambda i: {"x": 1e308, "y": 1e308}, "finite"), (lambda i: {"x": 10 ** 400}, "finite"),
    (lambda i: {"x": i == 1}, None), (lambda i: {"x": 2 ** 20 * i, "y": torch.ones(1)}, None),
    (lambda i: {"x": 1e200}, "finite"), (lambda i: Counter(x=i), None),
    (lambda i: SAME.update(x=i) or SAME, None),
    (lambda i: {"x": i, "y": 2} if i else {"y": 2, "x": 0}, None)])
def test_a_reward_of_ones_own(model, write, returned, says):
    """It gets the question; numbers of any kind are rewards, what is none is named."""
    write(model, ["a", "b"])
    seen, policy = [], copy.deepcopy(model)

    def mine(rollout, question):
        seen.append((rollout.text, question))
        return returned(len(seen) - 1)
    step = [policy, model, sgd(policy), asked(1), [noise(1.0)], range(2), GRPO(group=2), cut, mine]
    if says:
        error = error_of(echo.grpo_step, *step)
        assert "the reward mine returned " in error and says in error
    else:
        _, parts, _ = echo.grpo_step(*step)
        assert seen == [("a", asked(1)[0]), ("b", asked(1)[0])]
        assert {type(x) for part in parts for x in part.values()} == {float}
        assert [part["x"] for part in parts] == [returned(i)["x"] for i in range(2)]
        assert all(list(part) == sorted(part) for part in parts)  # each process logs them in order


def test_processes_have_the_same_rewards(monkeypatch):
    def gather(names, mine):
        names[:] = [mine, ["reward_b"]]
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert "other names of rewards" in error_of(echo.means, {"reward_a": (1.0, 1)})


def sgd(model, lr=0.0):
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr)


@pytest.mark.parametrize("micro_batch", [1, 32])
def test_grpo_update_against_a_plain_double_loop(model, write, monkeypatch, micro_batch):
    """Two mini-batches with an update between them, against tokens one by one: what is learned, and
    the metrics. One response of each is left out, flat or without text, but counts in the mean; so
    do those of a second process, which is here as large as this one."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.ones(()))
    monkeypatch.setattr(echo, "sum_over_processes", lambda n: 2 * n)
    policy, plain, reference = (copy.deepcopy(model) for _ in range(3))
    with torch.no_grad():  # a reference that differs
        for p in reference.decoder.parameters():
            p += 1e-3
    write(model, TEXTS)
    waves, advantages = [noise(2.0 + i, i) for i in range(4)], torch.tensor([1.0, -0.5, 0.3, 2.0])
    responses = respond(within(policy, 200), waves, temperature=0.7)
    for r, a in zip(responses, advantages.tolist()):
        r.logprobs = [x + 0.01 for x in r.logprobs]
        r.advantage = a
    optimizer, want = sgd(policy, 0.5), []
    empty, flat = Rollout(Sample(), waves[0], None, advantage=3.0), copy.deepcopy(responses[0])
    flat.advantage = 0.0
    got = echo.grpo_update(policy, reference, optimizer, [*responses[:2], empty, flat,
                                                          *responses[2:]],
                           GRPO(temperature=0.7, mini_batches=2, micro_batch=micro_batch))
    by_hand, old = sgd(plain, 0.5), [plain([r.sample], 0.7)[0].tolist() for r in responses]
    for half in ((0, 1), (2, 3)):
        total = 0.0
        for i in half:
            ref = reference([responses[i].sample], 0.7)[0].tolist()
            for t, p in enumerate(plain([responses[i].sample], 0.7)[0]):
                ratio, k3 = (p - old[i][t]).exp(), (ref[t] - p).exp() - (ref[t] - p) - 1
                free, bounded = ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i]
                loss = -min(free, bounded) + 0.04 * k3
                share = 1 / len(ref) / 6  # mean over a response's tokens, then over responses
                total = total + share * loss
                parts = (loss.item(), k3.item(), float(bounded < free),
                         abs(old[i][t] - responses[i].logprobs[t]))
                want.append(parts)
        by_hand.zero_grad()
        total.backward()
        by_hand.step()
    want = dict(zip(("loss", "kl", "clip_share", "logp_gap"), np.mean(want, 0).tolist()))
    want["entropy"] = -np.mean(sum((r.logprobs for r in [*responses, flat]), []))
    assert got == pytest.approx(want, abs=2e-4) and min(list(want.values())[1:]) > 0
    for (k, a), b in zip(policy.named_parameters(), plain.parameters()):
        assert (a - b).abs().max() < 2e-4, k


def test_grpo_step_pairs_each_response_with_its_question_and_group(model, write, monkeypatch):
    """Three responses to each of three questions, none right for the last."""
    texts = ["<answer>hum</answer>", "<answer>bell</answer>", "<answer>two</answer>"]
    write(model, texts)
    questions = [Asked(answer * 3, ["hum", "bell"], answer) for answer in ("hum", "bell", "gong")]
    seeds = [(7, k, g) for k in range(3) for g in range(3)]
    waves, advantages = [noise(1.0), noise(2.0), noise(3.0)], []
    monkeypatch.setattr(echo, "grpo_update",
                        lambda *a: advantages.extend(r.advantage for r in a[3]))
    responses, parts, _ = echo.grpo_step(model, None, None, questions, waves, seeds, GRPO(group=3))
    assert [r.text for r in responses] == texts * 3
    assert [len(r.wave) for r in responses] == [16_000] * 3 + [32_000] * 3 + [48_000] * 3
    assert [p["accuracy"] for p in parts] == [0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]
    want = [1.414, -0.707, -0.707, -0.707, 1.414, -0.707, 0, 0, 0]
    assert advantages == pytest.approx(want, abs=1e-2)


def test_flat_groups_teach_nothing_and_bad_gradients_end(model, write):
    """Nor does a question that does not fit, and it ends no run."""
    write(model, ["<answer>hum</answer>"] * 4)
    policy, long = within(copy.deepcopy(model), 50), Asked("what " * 3_000, ["a"], "a")
    policy.decoder.config.max_position_embeddings = 2_000
    responses, _, metrics = echo.grpo_step(policy, model, sgd(policy, 1.0), [*asked(1), long],
                                           [noise(1.0)] * 2, range(4), GRPO(group=2))
    assert [*metrics] == ["entropy"]  # there is no mean over no token
    assert all(map(torch.equal, policy.parameters(), model.parameters()))
    assert echo.group_advantages(torch.full((1, 8), 1.4)).abs().max() == 0  # fp32, too
    assert [r.ended for r in responses] == ["eos"] * 2 + ["prompt too long"] * 2
    with mock.patch.object(echo.Echo, "hear", side_effect=lambda waves, first_listen=False: waves):
        hours, = rollouts(model, asked(1), [torch.zeros(1).expand(5 * 3600 * 16_000)])
    assert hours.ended == "prompt too long" and not hours.sample.ids  # and it was not encoded
    responses[2].advantage = 1.0  # by chance, as a reward of one's own may give
    assert "loss" not in echo.grpo_update(policy, model, sgd(policy), responses[2:3], GRPO())
    policy.projector.weight.grad = torch.full_like(policy.projector.weight, math.nan)
    assert "lower learning rate" in error_of(echo.optimizer_step, sgd(policy))


def test_metrics_by_hand(model):
    heard = [Segment("", a, b, heard=True) for a, b in ((0, 2), (1, 3), (4, 4.3), (0, 1))]
    rows = [Rollout(Sample(ids=[5, AUDIO, AUDIO]), None, None, logprobs=[0.0] * 10, text=GOOD,
                    ended="eos", segments=[*heard[:3], Segment("x", refused="malformed")]),
            Rollout(Sample(), None, None, logprobs=[0.0] * 20, ended="length", segments=heard[3:])]
    events = [{"start_s": a, "end_s": b, "pulses": 6} for a, b in ((0.1, 1.9), (1.2, 2.0))]
    questions = [make_data.Question({}, None, "", ["hum"], "hum", category, listen_to)
                 for category, listen_to in (("a", events), ("length", ()))]
    want = {"accuracy": 0.5, "accuracy_a": 1, "accuracy_length": 0, "segments": 2,
            "hits": 1 / 3, "iou": (0.9 + 0.4) / 3,  # of three heard
            "heard_s": 2, "sound_s": 1.5,
            "rejected": 0.2, "truncated": 0.5, "length": 15, "audio_tokens": 1}
    assert generate.measure(questions, rows, {"a", "length"}) == pytest.approx(want)


# ------------------------------------------------------------------ pretrained parts, on stand-ins
@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A random-weight Qwen2 of Qwen2.5-0.5B's ratios, but with a head of its own, as the larger
    ones have. As there, "</seg>" is several pieces, and ">," or "></" may hold its end; a config
    that asks for dropout."""
    bpe, folder = ByteLevelBPETokenizer(), tmp_path_factory.mktemp("qwen")
    texts = ["<seg>1, 2</seg>, the hum</seg></think><answer>two", "How many pulses? Choose"] * 3
    bpe.train_from_iterator(texts, special_tokens=["<|endoftext|>", "<|im_end|>"])
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=bpe.get_vocab_size() + 3, hidden_size=56, intermediate_size=304,
        num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2, attention_dropout=0.3,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()),
                            eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def pretrained(folder, listener=None, **config):
    torch.manual_seed(0)
    return echo.Echo(Config(decoder=str(folder), **config), listener or echo.SmallEncoder(32, 1),
                     *echo.read_decoder(folder))


def test_a_pretrained_decoder_writes_tags_as_ordinary_text(qwen, write):
    """Audio comes after the token that closes a tag, even if that token holds more."""
    model = pretrained(qwen)
    texts = ["<think>a <seg>0, 0.2</seg>, it <seg>0, .4</seg></think><answer>two</answer>",
             "a <seg>9, 10</seg>, <seg>0, 0.2</seg> b"]
    want = ["<think>a <seg>0, 0.2</seg>,{0} it <seg>0, .4</seg></{0}{0}think><answer>two</answer>",
            "a <seg>9, 10</seg>, <seg>0, 0.2</seg>{0} b"]
    pieces = [model.tokenizer.decode([i]) for i in model.tokenize(texts[0])]
    assert "</seg>" not in pieces and ">," in pieces and "></" in pieces
    write(model, texts)
    for k, r in enumerate(respond(within(model, 200), [noise(1.0)] * 2)):
        assert r.sample.sampled == [*model.tokenize(texts[k]), 1]
        new = r.sample.ids[r.sample.trained.index(True):]
        assert spelled(model, new[:-1]) == want[k].format("[audio]" * 5) and r.text == texts[k]


@pytest.mark.parametrize("decoder", ["tiny", "qwen"])
@pytest.mark.parametrize("bf16", [True, False])
def test_an_update_begins_at_the_reference(model, qwen, write, decoder, bf16):
    """Before it the KL is exactly 0 and the ratio 1, also in bf16; trained weights stay fp32."""
    policy = copy.deepcopy(model) if decoder == "tiny" else pretrained(qwen)
    policy.bf16 = bf16
    reference = copy.deepcopy(policy).requires_grad_(False)
    write(policy, ["a <seg>0, 1</seg> two pulses" + " <hum>" * i for i in range(4)])
    responses = respond(within(policy, 100), [noise(3.0)] * 4, asked(1) * 4)
    advantages = torch.tensor([1.0, -0.5, 0.3, 2.0])
    for r, a in zip(responses, advantages.tolist()):
        r.advantage = a
    for n in (1, 2):
        got = echo.grpo_update(policy, reference, sgd(policy), responses,
                               GRPO(mini_batches=n, micro_batch=3))
        assert got["kl"] == got["clip_share"] == 0 < got["logp_gap"] < (0.1 if bf16 else 1e-5)
        lengths = torch.tensor([len(r.logprobs) for r in responses])
        want = -(advantages * lengths).sum() / lengths.sum()
        assert got["loss"] == pytest.approx(want.item(), abs=1e-6)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert policy.logits(torch.randn(2, policy.decoder.config.hidden_size)).dtype == torch.float32


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


def edit_config(folder, copy, **fields):
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))


def test_encoders(model, whisper, tmp_path):
    """A token for each begun piece of time. Whisper's: windows of 30 s, padding cut away; a
    thumbnail knows no detail."""
    other = micro(model.tokenizer, echo.make_encoder(str(whisper)), encoder=str(whisper))
    waves = [noise(s, i) for i, s in enumerate((0.2, 2.23, 31.0))]
    for m in (model, other):
        full, first = m.hear(waves), m.hear(waves, True)
        assert [len(t) for t in full] == [5, 56, 775] and [len(t) for t in first] == [1, 5, 62]
    for wave, tokens in zip(waves, full):
        extractor, last = WhisperFeatureExtractor(), wave[len(wave) // 480_000 * 480_000:]
        window = extractor(last.numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            want = other.encoder.whisper(window.input_features).last_hidden_state[0]
        want = want.view(750, 2, -1).mean(1)[:(len(tokens) - 1) % 750 + 1]
        assert (tokens[-len(want):] - want).abs().max() < 1e-4
    test_a_thumbnail_lacks_the_detail(other)
    edit_config(whisper, tmp_path / "two", encoder_layers=2)
    assert "weights of its encoder" in error_of(echo.make_encoder, str(tmp_path / "two"))
    (tmp_path / "two/model.safetensors").write_bytes(LFS)
    assert "no whole Whisper encoder" in error_of(echo.make_encoder, str(tmp_path / "two"))
    edit_config(whisper, tmp_path / "mels", num_mel_bins=80)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path / "mels")
    assert "preprocessor_config" in error_of(echo.make_encoder, str(tmp_path / "mels"))


# -------------------------------------------------------------------------------------------- data
def test_judge_catches_every_planted_fault():
    """And takes chains as they are annotated, whose ends are rough, for valid."""
    seen = set()
    for i in range(150):
        rng = np.random.default_rng([3, i])
        events = make_data.synthesise(rng)[1]
        make_data.annotate(events, 0.6, rng)
        for category in make_data.QUESTIONS:
            row = make_data.write_row(category, events, rng)
            assert make_data.judge(row, events) == ("sft", "")
            seen.add("early" if row["cot"] not in [
                q["cot"] for q in make_data.questions_about(make_data.exact(events))] else "exact")
            qa, chains = make_data.faulty(row, list(make_data.SYNTHETIC), rng)
            for verdict, rows in (("discarded", qa), ("rl", chains)):
                for fault, bad in rows.items():
                    assert make_data.judge(bad, events)[0] == verdict, (fault, bad)
                    assert bad["listen_to"] == row["listen_to"]
                    seen.add(fault)
    assert len(seen) == 2 + 3 + 5
    planted = [make_data.plant(row, list(make_data.SYNTHETIC), rng)[1] for _ in range(500)]
    assert abs(planted.count("intact") / 500 - 0.94 + 0.11 * len(row["listen_to"])) < 0.1


def test_questions_by_hand():
    """A clip with two hums, told apart by listening; only what is clear can be asked."""
    events = [{"kind": k, "start_s": a, "end_s": b, "pulses": n} for k, a, b, n in (
        ("hum", 0.21, 1.54, 3), ("bell", 2.0, 3.0, 6), ("hum", 3.47, 4.5, 5), ("hiss", 4.9, 6, 2))]
    known = {q["question"]: (q["answer"], q["cot"], q["listen_to"])
             for q in make_data.questions_about(events)}
    assert len(known) == 2 + 1 + 1 + 3 and known["How many pulses has the hiss?"][0] == "two"
    assert known["Which sound comes right after the bell?"][0] == "hum"
    assert known["How many pulses has the sound right after the slow hum?"][0] == "six"
    assert known["How many pulses has the sound right after the fast hum?"] == (
        "two", "<think>I look for the hum <seg>0.0, 1.5</seg> the hum has three pulses and is slow."
        " I look for the next hum <seg>3.5, 4.5</seg> the hum has five pulses and is fast. Right "
        "after it <seg>5.0, 6.0</seg> the hiss has two pulses and is slow.</think><answer>two"
        "</answer>", [events[0], *events[2:]])


@pytest.mark.parametrize("clip_s", [6.0, 7.5, 24.0])
def test_the_world_has_no_grid_and_is_searched(clip_s):
    """What RESULTS.md says of clips: lengths, gaps, and how many looks a search needs."""
    starts, looks, gaps = set(), [], []
    for i in range(60):
        rng = np.random.default_rng([4, i])
        wave, events = make_data.synthesise(rng, None, clip_s)
        assert len(wave) == clip_s * 16_000 and len(events) >= clip_s / 2
        for e, later in zip(events, [*events[1:], {"start_s": clip_s + 0.1, "end_s": clip_s}]):
            assert 0.8 <= round(e["end_s"] - e["start_s"], 2) <= 1.5 and e["end_s"] <= clip_s
            first, last = make_data.segment_of(e)
            assert first - 0.5 < e["start_s"] and e["end_s"] < last + 0.5 and last - first >= 1
            gaps.append(round(later["start_s"] - e["end_s"], 2))
            starts.add(e["start_s"])
        row = make_data.write_row("find", events, rng)
        looks.append(row["cot"].count("I look for"))
    assert min(gaps) >= -0.01 and len(starts) > 100 and looks.count(1) > 2 < looks.count(2)
    assert gaps.count(0) > 20 and sum(g > 1 for g in gaps) > 20


def test_what_the_detector_learns(model):
    """Two sounds that share a thumbnail's token; pulses count where the whole sound is."""
    hum, bell = ({"kind": k, "start_s": a, "end_s": b, "pulses": n} for k, a, b, n in (
        ("hum", 0.62, 2.2, 2), ("bell", 2.2, 3.0, 3)))
    detector = train_sft.Detector(model, ["bell", "hum"])
    kind, detail, *counts = detector.labels([hum, bell], 0.0, 8, 2).tolist()
    assert kind == [-1, 1, 2, 2, 0, -1, -1, -1] and counts == [[-1] * 8] * 2
    assert detail == [-1] * 4 + [5, 5, -1, -1]  # five numbers before "end"
    kind, *rest = detector.labels([hum, bell], 0.5, 50, 25).tolist()  # all of the hum, not the bell
    detail, before, left = ([n for n, _ in itertools.groupby(row)] for row in rest)
    assert [k for k, _ in itertools.groupby(kind)][:6] == [-1, 1, -1, 1, -1, 0]
    assert detail == [-1, 0, -1] and before == [-1, 0, 1, -1, 0, 1] and left == [-1, 1, 0, -1]
    assert 38 < sum(d >= 0 for d in rest[0]) < 41


def test_no_word_of_the_base_stage_is_in_pieces(data):
    """Words of several tokens make the tiny decoder learn places far too late."""
    settings = train_sft.Settings(clips=str(data / "clips.jsonl"))
    described, kinds = train_sft.read_clips(settings)
    model, rng = train_sft.new_model(settings, described), np.random.default_rng(0)
    for path, events in described[:8] * 3:
        places = tuple(make_data.segment_of(e) for e in events)
        for write in (train_sft.whole_clip, train_sft.short_clips):
            heard = train_sft.features_of(model)(path, places)
            sample = write(model, *heard, make_data.exact(events), rng, kinds)
            said = [model.tokenizer.decode([i]) for i in sample.ids if i != AUDIO]
            assert not any(a[-1].isalpha() and b[0].isalpha() for a, b in zip(said, said[1:]))


def test_where_pieces_begin():
    """Half of them at the sounds that share a cell, half a little before the segment."""
    sounds = [{"kind": "hum", "start_s": s, "end_s": e, "pulses": 2} for s, e in (
        (0.0, 1.0), (1.0, 2.3), (2.3, 3.2), (4.0, 5.0))]  # the second and the third share one
    rng = np.random.default_rng(0)
    starts = [train_sft.piece_start(sounds, rng) for _ in range(400)]
    assert 120 < sum(s in (1.0, 2.0) for s in starts) < 180  # 3/8 of them: 150
    assert 50 < sum(1.5 < s < 2 for s in starts) < 105 and min(starts) == 0.0
    assert {train_sft.piece_start(sounds[:1], rng) for _ in range(20)} == {0.0}


def test_same_seed_same_bytes_and_no_shared_clips(data, tmp_path):
    good("make_data --train-clips 24 --test-clips 2 --out", tmp_path)
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 32  # one is the lock
    assert all((data / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    train = {p.read_bytes() for p in (data / "audio/train").iterdir()}
    assert not train & {p.read_bytes() for p in (data / "audio/test").iterdir()}
    sft, rl, test = (read_rows(data / f"{name}.jsonl") for name in ("sft", "rl", "test"))
    published = {"id", "audio_path", "question", "multi_choice", "answer"}
    assert set(rl[0]) == published | {"category", "listen_to", "reason"}
    assert set(sft[0]) == set(rl[0]) | {"cot"} and set(test[0]) == set(sft[0]) - {"reason"}
    assert {row["id"] for row in test}.isdisjoint(row["id"] for row in sft + rl)


def test_recorded_sounds(tmp_path):
    """Recordings for each of five kinds, also short ones and others' names."""
    folder = tmp_path / "sounds"
    for name in ("__MACOSX", "@eaDir", ".x", "siren"):
        (folder / name).mkdir(parents=True)
    (folder / "siren/._0.wav").write_bytes(b"Mac OS X")
    for k, name in enumerate(("Big Drum", "siren", "\u00d6l", "gong", "\u0918\u0902\u091f\u0940")):
        (folder / name).mkdir(exist_ok=True)
        for i in range(2):
            sound = wav_bytes(noise(0.3 + i, 10 * k + i).clamp(-1, 1))
            (folder / name / f"{i}.WAV").write_bytes(sound)
    (folder / "gong/2.mp3").write_bytes(b"ID3")
    job = ["make_data --train-clips 6 --test-clips 2 --sounds", folder, "--out", tmp_path / "data"]
    assert "gong: 1 that are no .wav files are left out" in good(*job)
    clips = read_rows(tmp_path / "data/clips.jsonl")
    kinds = {e["kind"] for clip in clips for e in clip["A4_events"]}
    assert kinds == {"big-drum", "siren", "\u00f6l", "gong", "\u0918\u0902\u091f\u0940"}
    for sound in (np.full(8000, 0.5), np.arange(8000) % 4 / 2 ** 15):  # constant, dither
        (folder / "gong/0.WAV").write_bytes(wav_bytes(sound))
        assert "gong/0.WAV: silent" in mistake(*job)
    shutil.rmtree(folder / "gong")
    assert "4 folders" in mistake(*job)


ROW = {"question": "q", "answer": "a", "audio_path": "x.wav", "multi_choice": ["a", "b"]}


@pytest.mark.parametrize("content,says", [
    (ROW | {"question": ""}, "row 1: no text under 'question'"),
    (ROW | {"answer": None}, "row 1: the answer None is not"),
    (ROW | {"audio_path": 3}, "row 1: needed: 'audio_path'"),
    (ROW | {"multi_choice": "ab"}, "and 'multi_choice' (or 'choices'), a list of texts"),
    (ROW | {"answer": "c"}, "row 1: the answer 'c' is not one of the choices"),
    (ROW | {"multi_choice": ["a", None]}, "a list of texts or numbers"),
    (ROW | {"audio_path": "a\0.wav"}, "row 1: no such file: "),
    (json.dumps(ROW) + '\n{"question": \n', "line 2 column"), ('{\n"a": 1}', "a list of"),
    (json.dumps(ROW | {"question": "\ud83d"}), "not UTF-8"),
    (ROW, "row 1: no such file"), ("[1]", "row 1"), ('[{"question": "q"', "not JSON"),
    ("", "no rows"), (b'{"question": "\xe9"}', "not UTF-8")])
def test_broken_rows_are_one_line(tmp_path, content, says):
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = error_of(read_questions, tmp_path / "r.jsonl")
    assert says in error and "r.jsonl" in error


def test_features_belong_to_their_segment(model, tmp_path):
    path, times = tmp_path / "a.wav", ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0))
    path.write_bytes(wav_bytes(noise(1.0)))
    heard, wave = train_sft.features_of(model), load_audio(path)
    _, (first, segments) = heard(path, times), heard(path, times)
    assert torch.equal(first, model.hear([wave], True)[0]) and len(segments) == 3
    for start_s, end_s in times:
        want, = model.hear([cut(wave, start_s, end_s)])
        assert (segments[f"<seg>{start_s}, {end_s}</seg>"] - want).abs().max() < 1e-5
    assert "ends before its event at 5 s" in error_of(heard, path, ((5, 6),))


# ------------------------------------------------------------------------- the scripts, end to end
STAGES = ("--encoder-steps 4 --base-steps 6 --base-batch 2 "
          "--sft-steps 80 --sft-batch 8 --sft-lr 2e-3")  # enough to write tags and answers
RL = "--steps 3 --questions 2 --group 4 --eval-every 2"


def sft(runs, out, flags="", *more):
    data = runs.parent / "data"
    return ["train_sft", "--data", data / "sft.jsonl", "--clips", data / "clips.jsonl",
            "--out", out, *STAGES.split(), *flags.split(), *more]


def rl(runs, out, flags="", *more):
    data = runs.parent / "data"
    return ["train_rl", "--model", runs / "sft", "--data", data / "rl.jsonl", "--out", out,
            "--test", data / "test.jsonl", *RL.split(), *flags.split(), *more]


def untimed(folder):
    rows = read_rows(folder / "log.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="session")
def trained(data):
    """All stages at micro size, by the scripts: the folder of their folders."""
    runs = data.parent / "runs"
    good(*sft(runs, runs))
    good(*rl(runs, runs / "rl"))
    return runs


def test_logs_of_the_training_scripts(trained):
    logs = {run: read_rows(trained / run / "log.jsonl") for run in ("encoder", "base", "sft", "rl")}
    steps = [e for e in logs["rl"] if "reward" in e]
    assert [e["step"] for e in steps] == [1, 2, 3]
    assert max(e["segments"] for e in steps) > 0 and max(e["kl"] for e in steps) > 0
    evaluated = [e for e in logs["rl"] if "eval_accuracy" in e]
    assert [e["step"] for e in evaluated] == [0, 2, 3] and "eval_accuracy_find" in evaluated[0]
    results = (HERE / ".github/RESULTS.md").read_text()
    logged = {re.sub("accuracy_.*", "accuracy_...", k.removeprefix("eval_"))
              for log in logs.values() for e in log for k in e}
    for name in logged - {"step"}:
        assert f"`{name}`" in results, name  # every metric is defined there
    assert all(math.isfinite(x) for log in logs.values() for e in log for x in e.values())
    assert (trained / "rl/report.html").is_file() and not (trained / "rl/training.pt").exists()
    encoder, *stages = (load(trained / stage).state_dict() for stage in logs)
    for before, after in zip([encoder, *stages], stages):  # the encoder is frozen after its stage
        frozen = {k for k in before if torch.equal(before[k], after[k])}
        assert {k for k in before if k.startswith("encoder.")} <= frozen
        assert "projector.bias" not in frozen and "decoder.model.norm.weight" not in frozen


def test_benchmark_rows_come_back_whole(data, trained, tmp_path, monkeypatch):
    """With the evaluators' keys; what can't be answered is named and counted; in batches or not."""
    rows = [{"id": str(i), "question": r["question"], "choices": r["multi_choice"], "task": "sound",
             "answer": r["answer"], "audio_path": r["audio_path"]}
            for i, r in enumerate(read_rows(data / "test.jsonl")[:5])]
    out = tmp_path / "out.json"

    def job(rows, *more):
        (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows))  # as Windows writes it
        return ["generate --model", trained / "rl", "--audio-root", data,
                "--benchmark", tmp_path / "rows.json", "--output", out, *more]
    mmau = [{"audio_id" if k == "audio_path" else k: v for k, v in row.items()} for row in rows]
    mmau[0]["category"] = ["sound"]
    assert re.search(r"accuracy_sound +(\S+)\naccuracy +\1\n", good(*job(mmau)))
    answers = "B", None, "A", None, mmau[4]["answer"]  # letters instead of choices, or nothing
    unknown = [row | {"answer": answer} for row, answer in zip(mmau, answers)]
    code, said, err = run(*job(unknown))  # the rest is scored
    assert code == 0 and re.search(r"accuracy +[01]\n", said) and "4 of 5 have no answer" in err
    whole = json.loads(out.read_text())
    mmar = [row | {"modality": "x", "sub-category": "y", "response": "mine", "segments": 3,
                   "listen_to": [None, ["a"], "b", 5, [{"start_s": 1.0}]][i]}
            for i, row in enumerate(rows)]
    mmar[0]["choices"], mmar[0]["answer"] = [0, 1.5, True], True
    mmar[2]["audio_path"], mmar[3]["question"] = "./audio/g\0ne.wav", "q " * 60_000
    mmar[4]["choices"], mmar[3]["model_output"] = None, "another model's"
    with mock.patch.object(generate, "print", side_effect=BrokenPipeError, create=True):
        assert "error" in mistake(*job(mmar, "--batch", 2))  # all is written before it is said
    done = json.loads(out.read_text())
    code, _, err = run(*job(mmar, "--batch", 2))
    assert code == 1 and "3 of 5 can't" in err and "null byte" in err and "prompt too long" in err
    assert "1 of 5 had an answer or a trace already" in err
    assert "row 5: needed: 'audio_path'" in err and done == json.loads(out.read_text())
    with mock.patch.object(generate, "measure", side_effect=KeyboardInterrupt):
        assert run(*job(mmar))[0] == 130  # after its output: nothing is left over
    assert not list(tmp_path.glob("*.part"))
    real, calls = generate.rollouts, []

    def killed(*args):  # in the second batch
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)
    monkeypatch.setattr(generate, "rollouts", killed)
    lines = ["generate --batch 3 --model", trained / "rl", "--audio-root", data, "--benchmark",
             tmp_path / "rows.json", "--output", tmp_path / "lines.jsonl"]
    assert run(*lines)[0] == 130 and "lines.jsonl.part: what a run" in mistake(*lines)
    part = read_rows(tmp_path / "lines.jsonl.part")
    assert [row["id"] for row in part] == ["0", "1", "2"] and not out.with_suffix(".jsonl").exists()
    for source, row, before in zip(mmar, done, whole, strict=True):
        source.pop("model_output", None)
        assert source.items() <= row.items()
        answer = echo.extract_answer(row["echo"]["response"]) or ""
        assert row["answer_prediction"] == row["model_output"] == answer
        if row["id"] != "0":
            assert row["echo"]["response"] == (
                before["echo"]["response"] if row["id"] not in "234" else "")


@pytest.mark.parametrize("command,says", [
    ("generate --clip nowhere.wav --question q?", "No such file or directory: 'nowhere.wav'"),
    ("generate --clip nowhere.wav", "--question: needed"), ("generate a.wav", "unknown: a.wav"),
    ("generate --choices a b", "--clip and --question: needed"),
    ("generate --clip a.wav --question \udce9", "not UTF-8"),
    ("generate --output a --html ./a", "needed are different files"),
    ("generate --clip a.wav --question q --html a.wav", "and not the input"),
    ("generate --model m --output m/echo.json", "or the model's"),
    ("generate --clip a.wav --question q --audio-root b", "--audio-root is of a --benchmark"),
    ("generate --benchmark rows.jsonl --output a.wav", "a clip of the benchmark"),
    ("train_rl --model m --out m", "lies in its own input, m"),
    ("generate --benchmark a.json --clip a.wav", "has its own clips"),
    ("generate --clip a.part --question q --output a", "and not the input"),
    ("generate --output rows.jsonl/x", "needed are different files"),
    ("generate --max-new-tokens 99999", "--max-new-tokens 99999: the decoder's context"),
    ("make_data --sounds m --out m/data", "one lies in the other"),
    ("make_data --sounds m/kinds --out m", "one lies in the other"),
    ("make_data --loose 2 --out new", "a share, 0 to 1"),
    ("train_sft --model runs --no-thumbnail", "that --model leaves out"),
    ("train_sft --sft-batch 99999999999", "below 10000000"),
    ("train_sft --seed 18446744073709551616", "--seed 18446744073709551616: needed: at least 0"),
    ("train_rl --model nowhere", "nowhere: no Echo checkpoint there"),
    ("train_rl --steps many", "argument --steps: invalid int value: 'many'"),
    ("train_rl --temperature 0", "must be above 0"), ("train_rl --lr -1", "--lr -1.0: needed: at"),
    ("train_rl --out own", "own/model: not a trained model"),
    ("train_rl --questions 3 --mini-batches 2", "must be a multiple of"),
    ("train_rl --step 3", "unknown: --step 3"),
    ("train_sft --clips bare.jsonl --out new", "row 1: needs 'A4_events'"),
    ("train_sft --clips few.jsonl --out new", "few.jsonl: 2 kinds of sound"),
    ("train_sft --clips nul.jsonl --out new", "nul.jsonl, row 1: needs"),
    ("train_sft --clips over.jsonl --out new", "over.jsonl, row 1: needs 'A4_events' one after"),
    ("train_sft --no-thumbnail", "begun with another thumbnail; give"),
    ("train_rl --steps 9 --no-bf16", "begun with another steps; give"),
    ("train_sft --decoder no/qwen --out new", "no/qwen")])
def test_a_users_mistake_is_one_line(trained, tmp_path, monkeypatch, command, says):
    """The flags that the mistake is not about are good ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    event = {"kind": "hum", "start_s": 0.0, "end_s": 1.0}
    two = [event | {"pulses": 2}, {"kind": "bell", "start_s": 1.0, "end_s": 2.0, "pulses": 3}]
    over = [event | {"pulses": 2}, two[1] | {"start_s": 0.5}]
    for file, events in (("bare", [event]), ("few", two), ("nul", two), ("over", over)):
        row = {"audio_path": "\0" if file == "nul" else "a.wav", "A4_events": events}
        Path(f"{file}.jsonl").write_text(json.dumps(row))
    Path("rows.jsonl").write_text(json.dumps(ROW | {"audio_path": "a.wav"}))
    shutil.copytree(trained / "sft/model", "m")
    Path("own/model").mkdir(parents=True)
    Path("own/model/thesis.txt").write_text("mine")
    name, *flags = command.split()
    usual = {"generate": ["generate", "--model", trained / "rl"], "make_data": ["make_data"],
             "train_rl": rl(trained, trained / "rl"), "train_sft": sft(trained, trained)}[name]
    assert says in mistake(*usual, *flags)


def test_checkpoints(model, qwen, whisper, tmp_path, monkeypatch):
    """What is saved comes back, also on Windows, which has no os.sync; what can't be written is one
    line."""
    monkeypatch.delattr(os, "sync", raising=False)
    for name, saved in (("tiny", micro(model.tokenizer, echo.SmallEncoder())),
                        ("qwen", pretrained(qwen, echo.make_encoder(str(whisper)),
                                            encoder=str(whisper)))):
        save(saved, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == saved.config
        assert torch.equal(*(m([dialogue(m)])[0] for m in (again, saved)))
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=RuntimeError("the disk is full")))
    assert "new: can't be written" in error_of(save, saved, tmp_path / "new")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("the disk is full")))
    assert "b: can't be written" in error_of(make_data.write_atomically, tmp_path / "b", "text")
    assert not {"new", "b"} & {p.name for p in tmp_path.iterdir()}  # whole or not at all
    assert "not a file" in error_of(make_data.write_atomically, tmp_path, "text")
    monkeypatch.undo()
    if os.name == "posix":
        (tmp_path / "link").symlink_to(tmp_path / "tiny")
        save(micro(model.tokenizer, echo.SmallEncoder()), tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and load(tmp_path / "tiny")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"


@pytest.mark.parametrize("file,content", [
    ("echo.json", b""), ("echo.json", b'{"encoder": "small", "new_field": 1}'), ("echo.pt", b""),
    ("echo.json", b'{"encoder": "nowhere"}'), ("echo.pt", LFS), ("model.safetensors", LFS),
    ("model.safetensors", 5_000), ("echo.pt", 5_000), ("tokenizer.json", b"{"),
    ("config.json", None), ("echo.pt", {}),
    ("model.safetensors", {"model.norm.weight": torch.ones(48)})])
def test_a_broken_model_is_refused(model, tmp_path, file, content):
    """Truncated to some bytes, an LFS pointer, of another version, or with weights missing."""
    save(micro(model.tokenizer, echo.SmallEncoder()), tmp_path / "m")
    path = tmp_path / "m" / file
    if isinstance(content, dict):
        torch.save(content, path) if file == "echo.pt" else save_file(content, path)
    else:
        whole = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(whole[:content] if isinstance(content, int) else content)
    error = error_of(load, tmp_path / "m")
    assert "m: not a whole model" in error and "delete the folder" in error


def test_which_decoders_are_taken(qwen, tmp_path, write):
    """Qwen3, too; not one that can't end, or lacks embeddings for its tokens."""
    config = Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "q3")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen)
    tokenizer.save_pretrained(tmp_path / "q3")
    edit_config(tmp_path / "q3", tmp_path / "one", num_hidden_layers=1, layer_types=None)
    assert "has no place for" in error_of(echo.read_decoder, tmp_path / "one")
    edit_config(tmp_path / "q3", tmp_path / "window", layer_types=["sliding_attention"] * 2)
    assert "a sliding window" in error_of(echo.read_decoder, tmp_path / "window")
    three = pretrained(tmp_path / "q3")
    write(three, ["a <seg>0, 0.2</seg> b"])
    row, = respond(within(three, 100), [noise(1.0)], temperature=0.7)
    assert row.heard_segments
    assert (three([row.sample], 0.7)[0] - torch.tensor(row.logprobs)).abs().max() < 1e-4
    tokenizer.add_tokens([f"new{i}" for i in range(400)])
    tokenizer.save_pretrained(tmp_path / "q3")
    assert "embeddings" in error_of(echo.read_decoder, tmp_path / "q3")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(
        tmp_path / "q3")
    assert "no eos" in error_of(echo.read_decoder, tmp_path / "q3")
    (tmp_path / "q3/tokenizer.json").unlink()
    assert "q3: no whole decoder" in error_of(echo.read_decoder, tmp_path / "q3")


def test_streams_devices_and_memory(monkeypatch, capsys):
    """A notebook's streams, closed ones; a cluster's variables; more processes than GPUs."""
    for stream in (mock.Mock(spec=["write", "flush"]), None):
        with mock.patch.object(sys, "stdout", stream), pytest.raises(SystemExit) as end:
            echo.main(lambda: print("said"))
        assert not end.value.code
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")):
        with pytest.raises(SystemExit) as end:
            echo.main(mock.Mock(side_effect=error))
        assert end.value.code == 2 and "error: " in capsys.readouterr().err
    for several in ("2", "x"):
        monkeypatch.setenv("WORLD_SIZE", several)
        assert "WORLD_SIZE" in error_of(echo.pick_device, train=True)
    monkeypatch.setattr(torch.distributed, "init_process_group", mock.Mock(
        side_effect=torch.distributed.DistNetworkError("the address is in use")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the address is in use" in error_of(echo.pick_device, train=True)
    for rank in ("2", "-1"):
        monkeypatch.setenv("RANK", rank)
        assert f"rank {rank} of 2" in error_of(echo.pick_device, train=True)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "1 GPUs" in error_of(echo.pick_device)


def test_a_run_goes_on_only_from_its_own_inputs(data, trained, tmp_path, monkeypatch):
    """Killed, then moved, with another micro-batch and without its log, it goes on; with another
    model, other rows, a broken save, or beside another writer it ends with one line."""
    rows, first = tmp_path / "rl.jsonl", tmp_path / "first"
    data = shutil.copytree(data, tmp_path / "world")
    shutil.copy(data / "rl.jsonl", rows)
    shutil.copytree(trained / "sft", tmp_path / "sft")
    job = rl(trained, first, "--save-every 1 --data", rows, "--audio-root", data,
             "--model", tmp_path / "sft")
    with mock.patch.object(train_rl, "evaluate", side_effect=[None, KeyboardInterrupt]):
        assert run(*job)[0] == 130 and read_rows(first / "log.jsonl")[-1]["step"] == 2
    with make_data.lock(first):
        assert "another run is writing there" in mistake(*job)
    with open(rows, "a") as file:
        file.write("\n")
    assert "begun with another data" in mistake(*job)
    shutil.copy(data / "rl.jsonl", rows)
    clip = data / read_rows(rows)[0]["audio_path"]
    whole = clip.read_bytes()
    clip.write_bytes(wav_bytes(noise(6.0)))
    assert "begun with another data" in mistake(*job)
    clip.write_bytes(whole[:-100])
    point = tmp_path / "chains.jsonl"  # a row with a chain about the same clip
    point.write_text(json.dumps(read_rows(rows)[0] | {"cot": "<think>a</think>"}))
    for job_of, file in ((rl, rows), (sft, point)):
        more = ["--data", file, "--audio-root", data, "--model", trained / "sft"]
        assert "broken WAV" in mistake(*job_of(trained, tmp_path / "none"), *more)
    assert not list((tmp_path / "none").rglob("model"))
    clip.write_bytes(whole)
    monkeypatch.setattr(train_rl, "REWARD", lambda r, q: {"x": 1.0})
    assert "begun with another reward" in mistake(*job)
    monkeypatch.setattr(train_rl, "REWARD", echo.paper_reward)
    with mock.patch("inspect.getsource", side_effect=OSError):  # a reward without a source
        assert "begun with another reward" in mistake(*job)
    assert "begun with another test" in mistake(*job, "--test", rows)
    for unknown in (functools.partial(echo.paper_reward), lambda r, q: {"x": number}):
        number = 1.0  # a closure: its text does not hold the number
        monkeypatch.setattr(train_rl, "REWARD", unknown)
        assert "a plain function" in mistake(*job)
    monkeypatch.setattr(train_rl, "REWARD", echo.paper_reward)
    (tmp_path / "sft/model/.DS_Store").write_bytes(b"Mac OS X")
    (tmp_path / "sft/model/.cache").mkdir()
    (tmp_path / "sft/model/.cache/file").write_bytes(b"Hugging Face")
    for number in ("1", "2", "3"):  # folders that are called like a setting's value
        (tmp_path / number).mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "rl/model/echo.pt", tmp_path / "sft/model")
    assert "begun with another model" in mistake(*job)
    shutil.copy(trained / "sft/model/echo.pt", tmp_path / "sft/model")
    saved = (first / "training.pt").read_bytes()
    (first / "training.pt").write_bytes(saved[:5000])
    assert "training.pt: broken" in mistake(*job)
    (first / "training.pt").write_bytes(saved)
    (first / "log.jsonl").unlink()
    second = first.rename(tmp_path / "second run")
    good(*job, "--micro-batch", 3, "--out", second)
    assert [e["step"] for e in untimed(second)] == [1, 2, 2, 3, 3] and load(second)
    for broken in ("", "{", "\0", "5", '{"a": 1}', '{"step": 1, "reward": "x"}'):
        (second / "log.jsonl").write_text(broken)
        assert "already trained" in good(*job, "--out", second)
        assert not (second / "report.html").exists()
    for lost in ("", "[1]"):
        (second / "settings.json").write_text(lost)
        assert "lost or broken" in mistake(*job, "--out", second)
    shutil.rmtree(second / "model")
    (second / "model").mkdir()
    assert "train one" in error_of(load, second)
    good(*job, "--steps", 1, "--out", second)  # an empty folder is no model
    monkeypatch.setattr(make_data, "make_clip", mock.Mock(side_effect=KeyboardInterrupt))
    (data / "mine.jsonl").write_text("{}")  # new audio never stands beside old rows
    assert run("make_data --seed 3 --out", data)[0] == 130
    assert [path.name for path in data.glob("*.jsonl")] == ["mine.jsonl"]


def test_own_rows_and_limits(data, trained, tmp_path):
    """SFT on rows of one's own from any model folder; longer responses, fewer turns; and RL in
    which no prompt fits."""
    job = ["train_sft --sft-steps 1", "--model", trained / "base", "--data", data / "sft.jsonl",
           "--audio-root", data, "--clips", "none", "--out", tmp_path]
    with make_data.lock(tmp_path / "sft"):  # RL may write there
        assert "another run is writing there" in mistake(*job)
    assert "chains give another answer" not in good(*job)
    assert "already trained" in good(*job)
    chains = [f"<think>a {tag}</think><answer>{{}}</answer>"
              for tag in ("<seg>0, 1</seg>", "<seg>0:01, 0:02</seg>", "<seg>9, 10</seg>", "look")]
    row = read_rows(data / "sft.jsonl")[0]
    answers = [row["answer"]] * 4 + ["zebra"]
    (tmp_path / "chains.jsonl").write_text("\n".join(
        json.dumps(row | {"cot": c.format(a)}) for c, a in zip([*chains, chains[0]], answers)))
    assert "4 of 5 chains give another answer" in good(*job, "--data", tmp_path / "chains.jsonl",
                                                       "--out", tmp_path / "odd")
    (tmp_path / "chains.jsonl").unlink()
    shutil.rmtree(tmp_path / "odd")
    assert {p.name for p in tmp_path.iterdir()} == {"sft"}
    good(*rl(trained, tmp_path / "rl", "--steps 1 --max-new-tokens 130 --max-turns 2"))
    config = load(tmp_path / "rl").config
    assert (config.max_new_tokens, config.max_turns) == (130, 2)
    clip = ["generate --max-new-tokens 5 --temperature 1 --clip", data / "audio/test/00000.wav",
            "--model", tmp_path / "rl", "--question", "What?"]
    assert good(*clip) == good(*clip)  # draws, too, are repeated with the same seed
    good(*clip, "--output", tmp_path / "out.json")
    said = json.loads((tmp_path / "out.json").read_text())[0]["echo"]
    assert len(load(tmp_path / "rl").tokenize(said["response"])) <= 5
    rows = [json.dumps(row | {"question": "q " * 60_000}) for row in read_rows(data / "rl.jsonl")]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    code, out, err = run(*rl(trained, tmp_path / "long", "--data", tmp_path / "long.jsonl",
                             "--audio-root", data))
    assert code == 2 and "no prompt of step 1 fits" in err and "prompt too long, not used" in out


def test_pretrained_stages_end_to_end(data, trained, qwen, whisper, tmp_path):
    """Both stages on the stand-ins, in bf16; what is frozen stays."""
    bf16 = " --bf16 --micro-batch 3"
    flags = "--no-thumbnail --sft-steps 2" + bf16
    good(*sft(trained, tmp_path, flags, "--decoder", qwen, "--encoder", whisper))
    before, after = (load(tmp_path / stage).state_dict() for stage in ("encoder", "sft"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert all(re.search(r"layers\.[012]\.|model\.norm|projector", k) for k in changed) and changed
    sft_model = load(tmp_path / "sft")
    save(within(sft_model, 9), tmp_path / "sft/model")
    (tmp_path / "rl.jsonl").write_text(json.dumps(read_rows(data / "rl.jsonl")))  # a list
    good(*rl(trained, tmp_path / "rl", bf16 + " --test none", "--model", tmp_path / "sft",
             "--data", tmp_path / "rl.jsonl", "--audio-root", data))


# --------------------------------------------------------------------- kills and several processes
@pytest.mark.parametrize("name", ["base", "sft", "rl"])
def test_killed_and_run_again_ends_with_the_same_weights(trained, tmp_path, name):
    """SIGTERM, Ctrl-C and SIGKILL in the middle: the same command goes on and ends where the
    uninterrupted run ended."""
    for stage in ("encoder",) if name == "base" else ("encoder", "base"):
        shutil.copytree(trained / stage, tmp_path / stage)
    jobs = {"base": sft(trained, tmp_path, "--base-steps 60 --sft-steps 1 --save-every 1"),
            "sft": sft(trained, tmp_path, "--sft-batch 2 --save-every 1"),
            "rl": rl(trained, tmp_path / "rl", "--steps 15 --save-every 1")}
    folder, file = tmp_path / name, tmp_path / name / "training.pt"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):  # as soon as there is a new save
        before = file.stat().st_mtime_ns if file.exists() else 0
        script = process(f"{jobs[name][0]}.py", *jobs[name][1:])
        while not file.exists() or file.stat().st_mtime_ns == before:
            assert script.poll() is None, script.communicate()[1]
            time.sleep(0.01)
        script.send_signal(number)
        _, err = script.communicate()
        assert script.returncode == (130 if number == signal.SIGINT else -number), err
    assert "begun with another seed; give" in mistake(*jobs[name], "--seed", 3)
    (folder / "model.tmp").mkdir()  # as a kill in the middle of a save and of a line
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 9')
    good(*jobs[name])
    went_on, log = load(folder).state_dict(), untimed(folder)
    shutil.rmtree(folder)
    good(*jobs[name])
    torch.testing.assert_close(load(folder).state_dict(), went_on, rtol=0, atol=0)
    assert untimed(folder) == log
    assert f"{folder}: already trained" in good(*jobs[name])


PLAIN = """import echo, sys, torch, train_rl, train_sft
torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups, 0.1)
torch.nn.utils.clip_grad_norm_ = lambda parameters, _: torch.ones(())
del sys.argv[0]
echo.main(sys.modules[sys.argv[0]].run)
"""


def test_two_processes_equal_one(trained, tmp_path):
    """The same global batch on one and on two gloo processes: the same log and the same weights.
    The optimiser is plain SGD: Adam's first steps are signs, which would make much of a rounding,
    and clipping would hide a wrong scale."""
    for n in (1, 2):
        out = tmp_path / str(n)
        for stage in ("encoder", "base"):
            shutil.copytree(trained / stage, out / stage)
        for job in (sft(trained, out, "--sft-steps 1 --sft-lr 0.1"),
                    rl(trained, out / "rl", "--steps 1 --questions 4 --lr 0.01")):
            script = process("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
                             "--no-python", sys.executable, "-c", PLAIN, *job)
            _, err = script.communicate()
            assert script.returncode == 0, err[-2000:]
    for name, start in (("sft", "base"), ("rl", "sft")):
        before, one, two = (load(folder).state_dict() for folder in (
            trained / start, tmp_path / "1" / name, tmp_path / "2" / name))
        apart, learned = (sum(((w[k] - one[k]) ** 2).sum() for k in one) for w in (two, before))
        assert apart < 1e-3 * learned and learned > 1e-6
        for a, b in zip(*(untimed(tmp_path / n / name) for n in "12"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=3e-5), (name, b["step"])


# ------------------------------------------------------------------------------------------- pages
HOSTILE = "<script>document.title='pwned'</script><img src=x onerror='document.title=1'>&amp;"


def test_generate_prints_and_draws(data, trained, tmp_path, monkeypatch, write):
    """A held-out clip of the toy; then a response full of hostile text, in which one segment is
    heard and one is not, on a console that lacks a letter."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # a cluster's: only trainings start processes
    monkeypatch.chdir(data.parent)
    assert "truth:" in good("generate")
    said = f"{HOSTILE} <seg>0.5, 1.5</seg> it <seg>9, 10</seg> </seg> {HOSTILE}"
    write(load(trained / "rl"), [f"<think>{said}</think><answer>hum</answer>"])
    (tmp_path / "my clip.wav").write_bytes(wav_bytes(noise(3.0)))
    save(within(load(trained / "rl"), 300), tmp_path / "model")
    code, out, _ = run("generate --html", tmp_path / "trace.html", "--model", tmp_path / "model",
                       "--clip", tmp_path / "my clip.wav", "--question", f"{HOSTILE} ✓",
                       "--choices", "hum", HOSTILE, encoding="latin-1")
    assert code == 0 and f"(3.0 s)\n{HOSTILE} \\u2713 hum, {HOSTILE}\n" in out
    assert "</seg> [listens to 0.50 to 1.50 s] it" in out and "answer: hum" in out
    page = (tmp_path / "trace.html").read_text()
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page and not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert page.count('data-start="0.5" data-end="1.5"') == 2 and "outside the clip" in page
    loud = (20 * noise(1.0)).numpy().tobytes()
    (tmp_path / "loud.wav").write_bytes(wav(loud, bits=32, coding=3))
    assert run("generate --clip", tmp_path / "loud.wav", "--question", "q?", "--html",
               tmp_path / "loud.html", "--model", tmp_path / "model")[0] == 0
    sound = re.search("base64,([^\"]+)", (tmp_path / "loud.html").read_text())[1]
    samples = np.frombuffer(base64.b64decode(sound)[44:], "<i2")
    assert (abs(samples.astype(int)) > 32_766).sum() == 1  # quieter, not clipped
    assert (trained / "rl/report.html").read_text().count("<polyline") > 15
    row = {"audio_path": "none.wav", "question": "q", "multi_choice": ["a", "b"]}
    (tmp_path / "many.json").write_text(json.dumps([row] * 61))
    assert "the first 60 of 61" in run("generate --benchmark", tmp_path / "many.json", "--html",
                                       tmp_path / "many.html", "--model", tmp_path / "model")[2]
