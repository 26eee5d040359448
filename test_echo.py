"""pytest -q: each test compares with a trusted reference, a plain loop or hand-computed values.

    python test_echo.py [runs/rl]      # after training: what the README measures, printed
"""
import contextlib
import copy
import io
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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel)

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
import echo
import generate
import make_data
import train_rl
import train_sft
from echo import (AUDIO, Config, Echo, EchoError, Rollout, Sample, Segment, build, load, load_audio,
                  parse_segment, read_questions, rollouts, save)

HERE = Path(__file__).parent
MICRO = dict(dim=48, layers=2, heads=4, encoder_dim=32, encoder_layers=1, encoder_heads=2)
if __name__ != "__main__":
    torch.set_num_threads(1)  # the models here are micro, and processes then round alike
SCRIPTS = {m.__name__: m for m in (make_data, train_sft, train_rl, generate)}


def run(name, *args):
    """Run a script of the project in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, args)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as end:
        echo.main(SCRIPTS[name].run)
    return end.value.code or 0, out.getvalue(), err.getvalue()


def good(name, *args):
    """The same, where nothing may go wrong: stdout."""
    code, out, err = run(name, *args)
    assert code == 0, err[-2000:]
    return out


def process(*args, **more):
    """Start a script as a user does, also where this process was told to ignore Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more)


def noise(seconds, seed=0):
    return torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A micro data folder: 24 training clips, 2 test clips."""
    folder = tmp_path_factory.mktemp("world")
    good("make_data", "--out", folder / "data", "--train-clips", 24, "--test-clips", 2)
    return folder


@pytest.fixture(scope="session")
def tokenizer(world):
    rows = echo.read_rows(world / "data/sft.jsonl")
    return train_sft.tiny_tokenizer([f" {r['question']} Choose from {r['cot']}" for r in rows] * 2)


def micro(tokenizer, **config):
    torch.manual_seed(0)
    config = Config(**{**MICRO, **config})
    return build(config, train_sft.tiny_decoder(config, len(tokenizer)), tokenizer).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return micro(tokenizer)


# ------------------------------------------------------------------------------------------- audio

def wav(raw, rate=16_000, channels=1, bits=16, coding=1, says=None):
    block, size = channels * bits // 8, len(raw) if says is None else says
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, coding,
                       channels, rate, rate * block % 2 ** 32, block, bits, b"data", size) + raw


@pytest.mark.parametrize("bits,coding", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3)])
@pytest.mark.parametrize("channels,rate", [(1, 16_000), (2, 44_100), (3, 8_000)])
def test_wav_formats(tmp_path, bits, coding, channels, rate):
    t = np.arange(rate) / rate
    loud = (np.arange(channels) + 1) / channels
    wave = 0.5 * np.sin(2 * np.pi * 440 * t)[:, None] * loud
    if coding == 3:
        raw = wave.astype("<f4").tobytes()
    elif bits == 8:
        raw = (wave * 127 + 128).round().astype(np.uint8).tobytes()
    else:
        ints = (wave * (2 ** (bits - 1) - 1)).round().astype("<i4")
        raw = ints.view(np.uint8).reshape(-1, 4)[:, :bits // 8].tobytes()
    (tmp_path / "a.wav").write_bytes(wav(raw, rate, channels, bits, coding))
    heard, got_rate = echo.read_wav("a.wav", (tmp_path / "a.wav").read_bytes())
    assert heard.shape == wave.shape and got_rate == rate
    assert np.abs(heard - wave).max() < (0.02 if bits == 8 else 1e-4)
    mono = load_audio(tmp_path / "a.wav")
    want = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000) * loud.mean()
    assert abs(len(mono) - 16_000) <= 1
    assert (mono[800:15_000] - want[800:15_000]).abs().max() < 0.02


@pytest.mark.parametrize("name,content,says", [
    ("none.wav", None, "no such file"),
    ("n" * 5000 + ".wav", None, "can't be read"),
    ("song.mp3", b"ID3\x03" + b"\0" * 100, "ffmpeg -i song.mp3"),
    ("cut.wav", wav(b"\0" * 50, says=100), "50 of 100 bytes"),
    ("head.wav", b"RIFF\x10\0\0\0WAVEjunk\0\0\0\0", "no 'fmt ' or no 'data' chunk"),
    ("empty.wav", wav(b""), "empty"),
    ("mulaw.wav", wav(b"\0" * 4, coding=7, bits=8), "coding 7"),
    ("fast.wav", wav(b"\0" * 4, rate=4_294_967_295), "4294967295 Hz"),
    ("huge.wav", wav(struct.pack("<2f", 1e38, -1e38), bits=32, coding=3), "beyond 10,000"),
    ("nan.wav", wav(struct.pack("<2f", math.nan, 0), bits=32, coding=3), "NaN")],
    ids=lambda x: x[:9] if isinstance(x, str) else "")
def test_broken_audio_is_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EchoError) as error:
        load_audio(tmp_path / name)
    assert says in str(error.value) and name[:50] in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ------------------------------------------------------------------------------- encoder and model

@pytest.mark.parametrize("rate", [2.0, 0.0])
@pytest.mark.parametrize("first_listen", [True, False])
def test_encoder_batch_equals_one_by_one(rate, first_listen):
    torch.manual_seed(0)
    encoder = echo.SmallEncoder(Config(**MICRO, first_listen_rate=rate)).eval()
    waves = [noise(s, i) for i, s in enumerate((6.0, 0.2, 1.03, 2.5))]
    with torch.no_grad():
        together = encoder(waves, first_listen)
        for wave, tokens in zip(waves, together):
            a_second = rate if first_listen and rate else 25
            assert len(tokens) == math.ceil(len(wave) / 16_000 * a_second)
            assert (tokens - encoder([wave], first_listen)[0]).abs().max() < 1e-4


def test_first_listen_lacks_the_detail_and_has_the_place(model):
    """Two clips that differ in the number of pulses alone: the thumbnails agree."""
    t, mel = np.arange(16_000) / 16_000, {}
    for n in (2, 6):
        wave = noise(6.0, 1).numpy() * 1e-2
        wave[32_000:48_000] += 0.1 * np.sin(2 * np.pi * 900 * t) * make_data.pulse_train(n, 16_000)
        for first in (True, False):
            mel[n, first] = model.encoder.log_mel(torch.tensor(wave).float(), first)
    full = (mel[2, False] - mel[6, False]).abs()
    thumb = (mel[2, True] - mel[6, True])[::4].abs()
    assert full.max() > 2 and thumb.max() < 0.25 * full.max() and thumb.mean() < 0.02 * full.max()
    loudest = mel[2, True][::4].max(1).values  # twelve half seconds, the sound in 4 and 5
    assert loudest[4:6].min() > loudest[[*range(4), *range(6, 12)]].max() + 1


def dialogue(model, seed=0, seconds=3.0):
    """A prompt, some text, a re-listened segment, more text and eos."""
    wave = noise(seconds, seed)
    sample = model.prompt(model.hear([wave], True)[0], "How many pulses?", ["two", "three"])
    sample.add(model.ids("<think>I look for the hum <seg>0.5, 1.5</seg>"), trained=True)
    heard = model.hear([wave[8000:24_000 + 800 * seed]])[0]
    sample.add_audio(heard, model.config.share_position)
    return model.add_response(sample, " the hum has two pulses.</think><answer>two</answer>")


def test_batch_equals_one_by_one(model):
    samples = [dialogue(model, i, 2.0 + i) for i in range(3)]
    together = model.log_probs(samples)
    with torch.no_grad():
        for sample, logp in zip(samples, together):
            assert len(logp) == sum(sample.trained) and (model([sample]) - logp).abs().max() < 1e-4


@pytest.mark.parametrize("share", [True, False])
def test_positions(tokenizer, share):
    sample = dialogue(micro(tokenizer, share_position=share))
    at = max(t for t, i in enumerate(sample.ids) if i == AUDIO) - 24   # 25 re-listened tokens
    want = list(range(at)) + ([at] * 25 if share else list(range(at, at + 25)))
    rest = len(sample.ids) - len(want)
    assert sample.position == want + list(range(want[-1] + 1, want[-1] + 1 + rest))


def spelled(model, ids):
    """Ids as text, [audio] for audio."""
    runs = re.split("(a)", "".join("a" if i == AUDIO else "t" for i in ids))
    out, at = "", 0
    for piece in runs:
        text = ids[at:at + len(piece)]
        out += "[audio]" if piece == "a" else model.tokenizer.decode(text)
        at += len(piece)
    return out


def test_prompt_writes_times_and_holds_any_text(tokenizer):
    model, full = micro(tokenizer), micro(tokenizer, first_listen_rate=0.0)
    hostile = 'what is <|audio|> or <seg>1, 2</seg>, Ünïcode ✓ 日本 "<b>&amp;</b>" {0} {choices}?'
    prompt = model.prompt(torch.zeros(3, 32), hostile, ["{question}", "two"])
    said = f" {hostile} Choose from {{question}}, two.\n"
    assert spelled(model, prompt.ids) == "[audio]0.0[audio]0.5[audio]1.0" + said
    assert prompt.ids.count(AUDIO) == sum(map(len, prompt.audio)) == 3
    assert spelled(model, model.prompt(None, "Why?").ids) == " Why?\n"
    long = spelled(model, model.prompt(torch.zeros(2003, 32), "Why?").ids)
    assert long.endswith("[audio]1000.0[audio]1000.5[audio]1001.0 Why?\n")
    long = spelled(full, full.prompt(torch.zeros(25 * 1001 + 2, 32), "Why?").ids)
    assert long == "".join(f"[audio]{s}.0" + "[audio]" * 24 for s in range(1001)) + \
        "[audio]1001.0[audio] Why?\n"


# -------------------------------------------------------------------------------------------- tags

@pytest.mark.parametrize("text,want", [
    ("2.0, 3.0", (2.0, 3.0, None)), ("2,3", (2, 3, None)), (" 2.5s , 3 s ", (2.5, 3, None)),
    (".5, 1.", (0.5, 1, None)), ("0:02, 0:03.5", (2, 3.5, None)), ("2.0, 2.2", (2.0, 2.2, None)),
    ("0:32, 0:39.97", (32, 39.97, None)), ("38.0, 40.0", (38, 39.97, None)),
    ("5, 35", (5, 35, None)), ("5, 35.1", (5, 35.1, "too long")), ("0, 600", (0, 600, "outside the clip")),
    ("38, 40.1", (38, 40.1, "outside the clip")), ("3, 2", (3, 2, "reversed")),
    ("2.0, 2.1", (2.0, 2.1, "too short")), ("2, 2", (2, 2, "too short")),
    ("1:00, 1:02", (60, 62, "outside the clip")), ("1.2.3, 4", (None, None, "malformed")),
    *((x, (None, None, "malformed")) for x in ("-1, 2", "1", "1, 2, 3", "", "a, b", "1e3, 2e3",
                                                "nan, inf", "0:75, 2:00", "٣, ٤"))])
def test_segment_tags(text, want):
    got = parse_segment(text, 39.97)
    assert (got.start_s, got.end_s, got.reason) == want


def test_turn_limit_and_lone_tags():
    assert parse_segment("1, 2", 6.0, turns=7).reason is None
    assert parse_segment("1, 2", 6.0, turns=8).reason == "too many turns"
    text = "a <seg>1, 2</seg> b</seg><seg>c<seg>3, 4</seg>d <seg>5"
    pairs = [("a ", "1, 2"), (" b", None), ("<seg>c", "3, 4")]
    assert echo.split_segments(text) == (pairs, "d <seg>5")
    assert parse_segment(None, 6.0) == Segment("</seg> without <seg>", reason="malformed")


def test_ten_thousand_hostile_tags():
    rng, reasons = random.Random(0), set()
    alphabet = [*"019., :s-e\n\0²∞٣", "<seg>", "</seg>", "9" * 400, "1, 2", "1, 1.1", "1, 33"]
    for _ in range(10_000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(9)))
        segment = parse_segment(text, 60.0, rng.randrange(10))
        reasons.add(segment.reason)
        if segment.reason is None:
            assert 0 <= segment.start_s < segment.end_s <= 60
            assert 0.2 - 1e-6 <= segment.end_s - segment.start_s <= 30 + 1e-6
    assert reasons == {None, *echo.REASONS[:6]}


# ---------------------------------------------------------------------------------------- decoding

def write(monkeypatch, model, texts):
    """Make the row with seed i write texts[i] (or ids), by replacing what is sampled; everything
    else is the model's own."""
    ids = [t if isinstance(t, list) else model.ids(t) for t in texts]

    def sample_tokens(model, hidden, rows, temperature):
        logp = model.logits(hidden / (temperature or 1.0)).log_softmax(-1)
        tokens = [(ids[row.draws.initial_seed()] + [model.tokenizer.eos_token_id])[len(row.logprobs)]
                  for row in rows]
        return tokens, [logp[k, token].item() for k, token in enumerate(tokens)]
    monkeypatch.setattr(echo, "sample_tokens", sample_tokens)


def asked(model, waves, question="Which sound comes right after the hum?"):
    return [model.prompt(h, question + " What?" * i, ["hum", "bell"])
            for i, h in enumerate(model.hear(waves, True))]


def count_passes(monkeypatch, model):
    """A list that gets the (rows, cached and new positions) of each forward pass, and the cache."""
    passes, hidden = [], model.hidden

    def counted(ids, position, mask, audio, cache=None):
        out = hidden(ids, position, mask, audio, cache)
        passes.append((*mask.shape, cache))
        return out
    monkeypatch.setattr(model, "hidden", counted)
    return passes


TEXTS = ["<think>look <seg>0.5, 1.5</seg> the hum. Then <seg>1.0, 2.0</seg> it.</think>"
         "<answer>hum</answer>",
         "<think>look <seg>9, 10</seg> a <seg>1, 0</seg> b <seg>x</seg> c</seg> d</think>",
         "<answer>two Ünïcode ✓ 日本</answer>",
         "<think><seg>0, 1</seg><seg>3.5, 6.1</seg> both</think><answer>bell</answer>"]


def test_interleaved_rollout_hears_the_right_part_and_matches_training(model, monkeypatch):
    """Batched, cached, waiting rows: log-probs are those of a plain uncached pass over the ids."""
    waves, heard, hear = [noise(3.0 + i, i) for i in range(4)], [], model.hear
    prompts = asked(model, waves)
    write(monkeypatch, model, TEXTS)
    monkeypatch.setattr(model, "hear", lambda waves: heard.extend(waves) or hear(waves))
    rows = rollouts(model, prompts, waves, temperature=0.7, max_new_tokens=200)
    assert [r.text for r in rows] == TEXTS and echo.is_right(rows[2].text, "two ünïcode ✓ 日本")
    bad = ["outside the clip", "reversed", "malformed", "malformed"]
    assert [[(s.heard, s.reason) for s in r.segments] for r in rows] == [
        [(True, None)] * 2, [(False, reason) for reason in bad], [], [(True, None)] * 2]
    want = [waves[0][8000:24_000], waves[0][16_000:32_000], waves[3][:16_000], waves[3][56_000:]]
    assert len(heard) == 4 and all(any(torch.equal(h, w) for h in heard) for w in want)
    for r in rows:
        assert r.ended == "eos" and sum(r.sample.trained) == len(r.logprobs)
        with torch.no_grad():
            gap = model([r.sample], temperature=0.7) - torch.tensor(r.logprobs)
        assert gap.abs().max() < 1e-4
    after = rows[0].sample.ids[rows[0].n_prompt:]   # the audio stands right after the tag
    closed = after.index(AUDIO)
    assert model.tokenizer.decode(after[:closed]) == TEXTS[0][:TEXTS[0].index("</seg>") + 6]
    assert after[closed:closed + 25] == [AUDIO] * 25 and after[closed + 25] != AUDIO


def test_rows_wait_for_each_other_but_not_for_the_last(model, monkeypatch):
    """8 rows with 0 to 7 segments: each as alone, in few passes, ended rows and padding dropped."""
    texts = ["".join(" the hum" * (20 if (i + k) % 8 == 7 else 1) + "<seg>0, 0.2</seg>" * (k < i)
                     for k in range(i + 1)) for i in range(8)]
    waves, group = [noise(2.0, i) for i in range(4)], 2
    prompts, kept = asked(model, waves), dict(max_new_tokens=200, temperature=0.7)
    write(monkeypatch, model, texts)
    passes = count_passes(monkeypatch, model)
    rows = rollouts(model, prompts, waves, group, **kept)
    n_passes, longest = len(passes), max(len(r.logprobs) for r in rows)
    rounds = [[len(model.ids(x)) for x in re.findall("(?s).*?</seg>|.+$", t)] for t in texts]
    for_the_last = sum(max(r[k] for r in rounds if len(r) > k) for k in range(8))
    assert longest <= n_passes < 1.25 * longest < 0.7 * for_the_last
    final = len(rows[7].sample.ids)
    assert passes[n_passes - 1][0] == 1 and passes[n_passes - 1][1] < final + 10
    cached, computed = sum(r.cached for r in rows), sum(r.computed for r in rows)
    assert echo.response_metrics(rows)["padding"] == pytest.approx(1 - cached / computed)
    assert [r.cached for r in rows] == [len(r.sample.ids) - 1 for r in rows] and computed < 3 * cached
    split = rollouts(model, prompts, waves, group, max_rows=3, **kept)  # two rows at once
    for i, (r, s) in enumerate(zip(rows, split)):
        k = i // group
        alone = rollouts(model, prompts[k:k + 1], waves[k:k + 1], seeds=[i], **kept)[0]
        assert r.text == texts[i] and len(r.heard) == i
        for other in (alone, s):
            assert r.sample.ids == other.sample.ids and r.sample.position == other.sample.position
            assert np.allclose(r.logprobs, other.logprobs, atol=1e-4)


def test_inserted_audio_changes_what_follows_and_controls_differ(model, monkeypatch):
    wave, after = noise(3.0), {}
    prompts = asked(model, [wave])
    write(monkeypatch, model, TEXTS[:1])
    for how in ("segment", "random", "silence", "text"):
        more = {"reasoning": "text"} if how == "text" else {"insert": how}
        row = rollouts(model, prompts, [wave], **more)[0]
        closed = len(model.ids(TEXTS[0].partition("</seg>")[0] + "</seg>"))
        inserted = row.sample.ids[row.n_prompt + closed:][:25] == [AUDIO] * 25
        assert inserted == bool(row.heard) == (how != "text")
        after[how] = tuple(row.logprobs[closed:closed + 3])
    assert len(set(after.values())) == 4 and row.segments[0].reason == "text reasoning"
    row = rollouts(model, prompts, [wave], max_new_tokens=closed)[0]
    assert (row.ended, row.segments[0].reason) == ("length", "no room left")
    assert row.sample.ids[-1] != AUDIO


def test_sampled_rollouts_do_not_depend_on_their_batch(model):
    waves = [noise(2.0 + i, i) for i in range(3)]
    prompts = asked(model, waves)
    together = rollouts(model, prompts, waves, group=2, seeds=range(6), max_new_tokens=30)
    for i, row in enumerate(together):
        k = slice(i // 2, i // 2 + 1)
        alone = rollouts(model, prompts[k], waves[k], seeds=[i], max_new_tokens=30)[0]
        assert alone.sample.ids == row.sample.ids and alone.ended == row.ended
        assert np.allclose(alone.logprobs, row.logprobs, atol=1e-4)
    assert together[0].sample.ids != together[1].sample.ids


def test_greedy_equals_transformers_generate(model):
    """Text-only greedy decoding against transformers' own generate from the same embeddings."""
    wave = noise(2.0)
    prompts = asked(model, [wave])
    ours = rollouts(model, prompts, [wave], reasoning="text", temperature=0.0, max_new_tokens=20)[0]
    ids, _, mask, audio = model.tensors(prompts)
    theirs = model.decoder.generate(
        inputs_embeds=model.embed(ids, audio), attention_mask=mask, do_sample=False,
        max_new_tokens=20, eos_token_id=list(model.eos_ids), pad_token_id=0)[0].tolist()
    assert ours.sample.ids[ours.n_prompt:] == theirs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_probabilities(model, temperature):
    """4,000 draws against the softmax itself."""
    hidden = 8 * torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    rows = [SimpleNamespace(draws=torch.Generator().manual_seed(i)) for i in range(4000)]
    with torch.no_grad():
        p = (model.decoder.lm_head(hidden)[0] / temperature).softmax(-1)
        tokens, logp = echo.sample_tokens(model, hidden.expand(4000, -1), rows, temperature)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p)) / 4000
    assert ((counts - p).abs() < 5 * (p / 4000).sqrt() + 1e-3).all() and p.max() > 0.02
    assert torch.allclose(torch.tensor(logp), p.log()[tokens], atol=1e-4)


# -------------------------------------------------------------------------------- rewards and GRPO

GOOD = "<think>a <seg>1, 2</seg> the hum.</think><answer>hum</answer>"


@pytest.mark.parametrize("text,heard,parts", [
    (GOOD, 1, (0.5, 0, 0.5, 0.5)),
    (GOOD, 0, (0.5, 0, 0.5, 0)),
    (GOOD.replace("hum</answer>", "bell</answer>"), 1, (0.5, 0, 0, 0)),
    (GOOD.replace("</seg> the", "</seg> The"), 1, (0.5, -0.1, 0.5, 0.5)),  # behind a space, too
    (GOOD.replace("</seg> the", "</seg>The"), 1, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> the hum.", "</seg>"), 1, (0.5, -0.1, 0.5, 0.5)),  # nothing said
    (GOOD.replace("</seg> the hum.", "</seg>."), 1, (0.5, -0.1, 0.5, 0.5)),  # no word said
    (GOOD.replace("</seg> the", "</seg>, the"), 1, (0.5, 0, 0.5, 0.5)),
    ("<think>a <seg>1, 2</seg><seg>2, 3</seg> the hum</think><answer>hum</answer>", 2,
     (0.5, -0.1, 0.5, 0.5)),
    ("<think>a <seg>1, 2</seg> <seg>2, 3</seg> Hm</think><answer>hum</answer>", 2,
     (0.5, -0.2, 0.5, 0.5)),
    ("<think>" + "<seg>1, 2</seg>" * 7 + "</think><answer>hum</answer>", 7, (0.5, -0.5, 0.5, 0.5)),
    ("a <seg>1, 2</seg>", 1, (0, -0.1, 0, 0)),
    ("<think>a</think><answer>Hum.</answer>", 0, (0.5, 0, 0.5, 0)),
    ("<think>a</think> hum", 0, (0, 0, 0, 0)),
    ("<think>a</think><answer>hum</answer><answer>bell</answer>", 0, (0, 0, 0, 0)),
    ("<answer>hum</answer><think>a</think>", 0, (0, 0, 0.5, 0)),
    ("<think>a<think>b</think><answer>hum</answer>", 0, (0, 0, 0.5, 0)),
    ("", 0, (0, 0, 0, 0))])
def test_rewards_by_hand(text, heard, parts):
    segments = [Segment("1, 2", 1, 2, heard=True)] * heard + [Segment("x", reason="malformed")]
    row = Rollout(Sample(), None, None, segments=segments, text=text, confidence=0.8)
    got = echo.paper_reward(row, "hum")
    assert tuple(got.values()) == pytest.approx(parts)
    assert list(got) == ["format", "consistency", "accuracy", "segment"]
    got, right = echo.confidence_reward(row, "hum"), parts[2] > 0
    want = 0.5 * (1 - 0.2 ** 2) if right else -0.5 * 0.8 ** 2
    assert tuple(got.values()) == pytest.approx((*parts[:2], want, want if parts[3] else 0))


def test_confidence_is_that_of_the_first_answer_token(model, monkeypatch):
    write(monkeypatch, model, ["<think>a</think><answer>two pulses</answer>"])
    row = rollouts(model, asked(model, [noise(1.0)]), [noise(1.0)])[0]
    before = len(model.ids("<think>a</think><answer>"))
    assert row.confidence == pytest.approx(math.exp(row.logprobs[before]))


def test_advantages_and_flat_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.5, 0.5, 0.5, 0.5]])
    got = echo.group_advantages(rewards)
    assert got[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3) and got[1].tolist() == [0] * 4
    assert got[2].tolist() == pytest.approx([1.732, -0.577, -0.577, -0.577], abs=1e-2)


def test_grpo_loss_against_a_plain_double_loop():
    rng, lengths, clip, beta = np.random.default_rng(0), [3, 5, 1], 0.2, 0.04
    logp, old, ref = (rng.normal(-2, 0.5, sum(lengths)) for _ in range(3))
    adv, want, n_clipped, at = [1.3, -0.7, 0.2], 0.0, 0, 0
    for n, a in zip(lengths, adv):  # mean over responses of the mean over tokens
        total = 0.0
        for t in range(at, at + n):
            ratio = math.exp(logp[t] - old[t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            k3 = math.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            total += -min(ratio * a, clipped * a) + beta * k3
            n_clipped += clipped * a < ratio * a
        want, at = want + total / n / len(lengths), at + n
    weights = echo.response_weights([Sample(trained=[True] * n) for n in lengths], len(lengths))
    advantage = torch.tensor(adv).repeat_interleave(torch.tensor(lengths))
    each, k3, bounded = echo.grpo_loss(*map(torch.tensor, (logp, old, ref)), advantage, clip, beta)
    assert (weights * each).sum().item() == pytest.approx(want, abs=1e-6)
    assert (k3 >= 0).all() and bounded.sum() == n_clipped > 0


def test_no_gradient_at_audio_and_some_at_eos(model, monkeypatch):
    """The trained positions are the sampled ids: audio out, eos in."""
    sample = dialogue(model)
    trained = {t for t, on in enumerate(sample.trained) if on}
    audio = {t for t, i in enumerate(sample.ids) if i == AUDIO}
    assert not trained & audio and len(sample.ids) - 1 in trained
    assert sample.ids[-1] in model.eos_ids
    hidden = model.hidden(*model.tensors([sample])).detach().requires_grad_()
    monkeypatch.setattr(model, "hidden", lambda *a: hidden)
    (-model([sample]).mean()).backward()
    touched = {t + 1 for t in range(len(sample.ids)) if hidden.grad[0, t].abs().sum() > 0}
    assert touched == trained  # position t predicts t + 1


def test_log_probs_in_chunks(model):
    samples = [dialogue(model, i) for i in range(24)]  # more than 512 trained tokens
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    logp = whole(samples)
    assert len(logp) > 512
    logp.mean().backward()
    one_by_one = torch.cat([parts([s]) for s in samples])
    one_by_one.mean().backward()
    assert torch.allclose(logp, one_by_one, atol=1e-4)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        if not name.startswith("encoder."):
            assert (a.grad - b.grad).abs().max() < 1e-5, name


def test_micro_batches_cover_everything_within_budget():
    lengths = [3, 9, 2, 30, 5, 5, 5]
    batches = echo.micro_batches([Sample(ids=[0] * n) for n in lengths], 20)
    assert batches == [[0, 1], [2], [3], [4, 5, 6]]


class Watched(echo.Training):
    """A training whose update keeps the gradients and changes nothing."""
    def update(self, lr):
        self.gradients = {k: p.grad.clone() for k, p in self.trained.items() if p.grad is not None}


def grpo_settings(**more):
    return train_rl.Settings(**{"mini_batches": 1, "train": "decoder", "dtype": "fp32", **more})


@pytest.mark.parametrize("budget", [150, 16_384])
def test_grpo_update_against_one_plain_pass_a_response(model, tmp_path, budget):
    """One update in micro-batches: gradient and metrics of a plain loop over responses."""
    policy, reference, settings = copy.deepcopy(model), copy.deepcopy(model), grpo_settings()
    settings.tokens_per_batch, settings.temperature = budget, 0.7
    with torch.no_grad():  # a reference and an older policy that differ
        for p in reference.decoder.parameters():
            p += 1e-3
    waves = [noise(2.0 + i, i) for i in range(4)]
    responses = rollouts(model, asked(model, waves), waves, temperature=0.7, max_new_tokens=12)
    old = [torch.tensor(r.logprobs) + 0.3 * (-1) ** torch.arange(len(r.logprobs)) for r in responses]
    for r, logp in zip(responses, old):
        r.logprobs = logp.tolist()
    echo.prepare(policy, settings)
    training = Watched(tmp_path, policy, {})
    advantages = torch.tensor([1.0, -0.5, 0.3, 2.0])
    got = echo.grpo_update(training, policy, reference, responses, advantages, settings, 1.0)
    want, plain = dict.fromkeys(got, 0.0), copy.deepcopy(policy)
    plain.zero_grad()
    for r, before, a in zip(responses, old, advantages):
        logp, ref = plain([r.sample], 0.7), reference([r.sample], 0.7).detach()
        loss, k3, clipped = echo.grpo_loss(logp, before, ref, a)
        (loss.mean() / 4).backward()
        for k, x in zip(got, (loss, k3, clipped, -before, (logp - before).abs())):
            want[k] += x.mean().item() / 4
    assert list(got) == ["loss", "kl", "clip_share", "entropy", "logp_gap"]
    assert list(got.values()) == pytest.approx(list(want.values()), abs=1e-4)
    assert got["clip_share"] > 0 and got["kl"] > 0
    for k, p in plain.named_parameters():
        assert k not in training.gradients or (training.gradients[k] - p.grad).abs().max() < 1e-4, k


def test_response_metrics_by_hand():
    def heard(*spans):
        return [Segment("", a, b, heard=True) for a, b in spans]
    bad = [Segment("x", reason="malformed")]
    rows = [Rollout(Sample(ids=[5, AUDIO, AUDIO]), None, None, logprobs=[0.0] * 10, text=GOOD,
                    ended="eos", segments=heard((0, 2), (1, 3), (4, 4.3)) + bad),
            Rollout(Sample(), None, None, logprobs=[0.0] * 20, text="", ended="length",
                    segments=heard((0, 1)), cached=30, computed=40)]
    got = echo.response_metrics(rows)
    want = {"segments": 2, "segment_s": 5.3 / 4, "short_segments": 1 / 4, "overlap": 1 / 5.3,
            "listened_once": 1, "listened_twice": 0.5, "truncated": 0.5, "no_answer": 0.5,
            "length": 15, "audio_tokens": 1, "padding": 0.25, "rejected_malformed": 0.2}
    assert {k: v for k, v in got.items() if v or k in want} == pytest.approx(want)
    assert len(got) == len(want) - 1 + len(echo.REASONS)
    assert not any(echo.response_metrics([]).values())


# --------------------------------------------------------------- pretrained parts, on stand-ins

def qwen_tokenizer():
    """Byte-level pieces as in Qwen's: "</seg>" is several, and ">," or "></" may hold its end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["<seg>1, 2</seg>, the hum</seg></think><answer>two", "How many pulses? Choose"] * 3
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_end|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Folders of random-weight Qwen2s of the shape ratios of Qwen2.5-0.5B, by tied heads or not."""
    folders = {tied: tmp_path_factory.mktemp("qwen") for tied in (True, False)}
    for tied, folder in folders.items():
        tokenizer = qwen_tokenizer()
        torch.manual_seed(1)
        decoder = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer) + 3, hidden_size=56, intermediate_size=304,
            num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2,
            initializer_range=0.1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1))
        decoder.generation_config.eos_token_id = [1, 7]
        decoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def pretrained(folder, train="decoder", dtype="fp32", **config):
    config = {k: v for k, v in MICRO.items() if k.startswith("encoder")} | config
    torch.manual_seed(0)
    return echo.prepare(build(Config(decoder=str(folder), **config)),
                        grpo_settings(train=train, dtype=dtype))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", ["decoder", "last-1", "projector"])
def test_pretrained_decoder_keeps_its_vocabulary_and_writes_tags(qwen, monkeypatch, tied, train):
    model, plain = pretrained(qwen[tied], train), Qwen2ForCausalLM.from_pretrained(qwen[tied])
    table, head = model.decoder.get_input_embeddings().weight, model.decoder.lm_head.weight
    assert torch.equal(table, plain.model.embed_tokens.weight) and (table is head) == tied
    assert torch.equal(head, plain.lm_head.weight) and model.eos_ids == {1, 7}
    assert len(model.tokenizer) == len(AutoTokenizer.from_pretrained(qwen[tied]))
    layers = {"decoder": "012", "last-1": "2", "projector": ""}[train]
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    want = {k for k, _ in model.named_parameters() if k.startswith("projector.")
            or k.startswith("decoder.model.layers.") and k.split(".")[3] in layers
            or k == "decoder.model.norm.weight" and layers}
    assert trained == want
    texts = ["<think>a <seg>0, 0.2</seg>, the hum <seg>0, .4</seg></think><answer>two</answer>",
             "a <seg>9, 10</seg>, <seg>0, 0.2</seg> b"]
    before_audio = ["<think>a <seg>0, 0.2</seg>,", "a <seg>9, 10</seg>, <seg>0, 0.2</seg>"]
    ids, pieces = [model.ids(t) for t in texts], [model.piece(i) for i in model.ids(texts[0])]
    assert "</seg>" not in pieces and ">," in pieces and "></" in pieces
    wave = noise(1.0)
    prompts = asked(model, [wave])
    write(monkeypatch, model, ids)
    for k, r in enumerate(rollouts(model, prompts, [wave], group=2)):
        new, on = r.sample.ids[r.n_prompt:], r.sample.trained[r.n_prompt:]
        assert [i for i, sampled in zip(new, on) if sampled] == [*ids[k], 1] and r.text == texts[k]
        assert {i for i, sampled in zip(new, on) if not sampled} == {AUDIO}
        assert model.tokenizer.decode(new[:new.index(AUDIO)]) == before_audio[k]
        assert [s.heard for s in r.segments] == [k == 0, True]
        with torch.no_grad():
            assert torch.allclose(model([r.sample]), torch.tensor(r.logprobs), atol=1e-4)


@pytest.mark.parametrize("tied,train", [(True, "decoder"), (False, "last-1"), (True, "projector")])
def test_bf16(qwen, monkeypatch, tmp_path, tied, train):
    """Frozen matrices are bf16, trained weights and angles fp32; KL is 0 and the ratio 1 at first."""
    policy = pretrained(qwen[tied], train, "bf16")
    reference = echo.prepare(copy.deepcopy(pretrained(qwen[tied], train)),
                             grpo_settings(train="none", dtype="bf16")).eval()
    for model in (policy, reference):
        for p in [p for p in model.decoder.parameters() if p.dim() == 2]:
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        assert model.decoder.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight) == tied
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    wave, hidden = noise(3.0), 8 * torch.randn(4, 56)
    exact = F.linear(hidden, policy.decoder.lm_head.weight.float())
    assert policy.logits(hidden).dtype == torch.float32 and torch.equal(policy.logits(hidden), exact)
    prompts = asked(policy, [wave], "How many pulses? " * 420)
    passes = count_passes(monkeypatch, policy)
    ids = [policy.ids("a <seg>0, 1</seg> two pulses" + " <hum>" * i) for i in range(4)]
    write(monkeypatch, policy, ids)
    responses = rollouts(policy, prompts, [wave], 4, max_new_tokens=100)
    assert {x.dtype for layer in passes[0][2].layers for x in (layer.keys, layer.values)} == \
        {torch.bfloat16}
    assert len(prompts[0].ids) > 2000 and all(r.heard for r in responses)
    for a, b in zip(*(m.log_probs([r.sample for r in responses]) for m in (policy, reference))):
        assert torch.equal(a, b)
    training, adv = Watched(tmp_path, policy, {}), torch.tensor([1.0, -0.5, 0.3, 2.0])
    got = echo.grpo_update(training, policy, reference, responses, adv, grpo_settings(), 1.0)
    assert got["kl"] == got["clip_share"] == 0 < got["logp_gap"] < 0.1
    assert got["loss"] == pytest.approx(-adv.mean().item(), abs=1e-6)


def test_bf16_of_a_tiny_decoder(model):
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    echo.prepare(policy, grpo_settings(dtype="bf16"))
    echo.prepare(reference, grpo_settings(dtype="bf16", train="none"))
    assert torch.equal(*(m.log_probs([dialogue(model)])[0] for m in (policy, reference)))
    assert not echo.set_precision(copy.deepcopy(model), "auto").bf16


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(2)
    WhisperModel(WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
        vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_whisper_encoder(tokenizer, whisper, rate):
    """Windows of 30 s, padding cut away, 25 tokens a second; a batch equals one by one."""
    model = micro(tokenizer, encoder=str(whisper), first_listen_rate=rate)
    waves = [noise(s, i) for i, s in enumerate((0.2, 3.0, 31.0))]
    full, first = model.hear(waves), model.hear(waves, True)
    assert [len(t) for t in full] == [5, 75, 775]
    for wave, tokens in zip(waves, full):
        assert (model.hear([wave])[0] - tokens).abs().max() < 1e-4
    for seconds in (waves[1], waves[2][480_000:]):  # and the second window of the long one
        inputs = model.encoder.extractor(seconds.numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            want = model.encoder.whisper(inputs.input_features).last_hidden_state[0]
        want = want.view(750, 2, -1).mean(1)[:len(seconds) // 640]
        assert any((t[-len(want):] - want).abs().max() < 1e-4 for t in full[1:])
    assert [len(t) for t in first] == ([1, 6, 62] if rate else [5, 75, 775])
    want = torch.stack([full[1][math.floor(i * 12.5):math.ceil((i + 1) * 12.5)].mean(0)
                        for i in range(6)]) if rate else full[1]
    assert (first[1] - want).abs().max() < 1e-4


class LoudnessEncoder(torch.nn.Module):
    """The README's "your own encoder": loudness of each 40 ms."""
    TOKENS_PER_SECOND, dim = 25, 4

    def forward(self, waves, first_listen):
        padded = [F.pad(w, (0, -len(w) % 640)).view(-1, 640) for w in waves]
        return [w.abs().mean(1, keepdim=True).repeat(1, 4) for w in padded]


def test_your_own_encoder(model, monkeypatch):
    mine = Echo(Config(first_listen_rate=0.0), LoudnessEncoder(), model.decoder, model.tokenizer)
    wave = torch.cat([torch.zeros(16_000), torch.ones(16_000)])
    prompts = asked(mine, [wave])
    write(monkeypatch, mine, TEXTS[:1])
    row = rollouts(mine, prompts, [wave])[0]
    heard = torch.cat(row.sample.audio)[:, 0].round().int().tolist()
    assert heard == [0] * 25 + [1] * 25 + [0] * 13 + [1] * 12 + [1] * 25


def test_a_prompt_longer_than_the_decoders_positions(model):
    wave, room = noise(1.0), model.decoder.config.max_position_embeddings
    with pytest.raises(EchoError) as error:
        rollouts(model, [model.prompt(None, "hum " * room)], [wave])
    assert str(room - 100) in str(error.value) and "\n" not in str(error.value)


def test_follow_decoder(capsys):
    for module in (train_sft, train_rl):
        for kind, name in enumerate(("tiny", "some/qwen")):
            settings, first = module.Settings(), list(module.BY_DECODER)[0]
            setattr(settings, first, 7)  # what is given stays
            echo.follow_decoder(settings, module.BY_DECODER, name)
            for key, values in module.BY_DECODER.items():
                assert getattr(settings, key) == (7 if key == first else values[kind])
            said = capsys.readouterr().out
            assert all(f"{key} " in said for key in module.BY_DECODER) if kind else said == ""


# -------------------------------------------------------------------------------------------- data

def test_judge_catches_every_planted_fault():
    kinds, seen = list(make_data.SYNTHETIC), set()
    for i in range(60):
        rng = np.random.default_rng([3, i])
        _, events = make_data.synthesise(rng)
        for category in make_data.CATEGORIES:
            row = make_data.write_row(category, events, rng)
            assert make_data.judge_qa(row, events) is make_data.judge_cot(row, events) is None
            assert row["answer"] in row["multi_choice"] and len(set(row["multi_choice"])) == 4
            for name, plant in (make_data.QA_FAULTS | make_data.COT_FAULTS).items():
                bad = row | plant(row, events, kinds, rng)
                qa = make_data.judge_qa(bad, events)
                assert bool(qa) == (name in make_data.QA_FAULTS), (name, bad)
                assert qa or make_data.judge_cot(bad, events), (name, bad)
                seen.add(name)
            for a, b in (("<think>", "<think>Well. "), ("</think>", " So be it.</think>"),
                         (" <seg>", ", so <seg>"), ("</seg> the", "</seg> surely the")):
                assert make_data.judge_cot(row | {"cot": row["cot"].replace(a, b, 1)}, events)
    assert {"take_back", "embellish"} < seen and len(seen) == 14


def test_same_seed_same_bytes_and_no_shared_clips(world, tmp_path):
    good("make_data", "--out", tmp_path / "again", "--train-clips", 24, "--test-clips", 2)
    data = world / "data"
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 31
    assert all((data / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    good("make_data", "--out", tmp_path / "b", "--train-clips", 2, "--test-clips", 2, "--seed", 1)
    train = {p.read_bytes() for p in (data / "audio/train").iterdir()}
    assert (tmp_path / "b/audio/train/00000.wav").read_bytes() not in train
    assert not train & {p.read_bytes() for p in (data / "audio/test").iterdir()}
    sft, rl = (echo.read_rows(data / f"{name}.jsonl") for name in ("sft", "rl"))
    assert set(rl[0]) == {"id", "audio_path", "question", "multi_choice", "answer"}
    assert set(sft[0]) == set(rl[0]) | {"cot"}


KINDS = {"Big Drum": "big-drum", "tabla_na": "tabla-na", "HISS": "hiss", "gong": "gong", "e3": "e3"}


def test_recorded_sounds(tmp_path, monkeypatch):
    """A folder of recordings for each kind; what is held out is heard in the test alone."""
    folder, out = tmp_path / "sounds", tmp_path / "data"
    for k, name in enumerate(KINDS):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            sound = noise(0.3 + 0.5 * i, 10 * k + i).numpy()
            (folder / name / f"{i}.WAV").write_bytes(make_data.wav_bytes(sound.clip(-1, 1)))
    train, test = make_data.read_sounds(folder, 0.5, 0)
    assert set(train) == set(test) == set(KINDS.values())
    for kind in train:
        a, b = ({sound.tobytes() for sound in split[kind]} for split in (train, test))
        assert len(a) == len(b) == 2 and not a & b
    train, test = make_data.read_sounds(folder, 0.0, 0)
    assert all(len(train[kind]) == 4 for kind in train) and train.keys() == test.keys()
    used, real = [], make_data.make_split  # each split gets its own recordings
    monkeypatch.setattr(make_data, "make_split", lambda *a: used.append(a[1::2]) or real(*a))
    flags = ["--sounds", folder, "--out", out, "--train-clips", 6, "--test-clips", 2,
             "--qa-faults", 0, "--cot-faults", 0]
    good("make_data", *flags, "--hold-out", 0.25)
    assert [(name, len(sounds["gong"])) for name, sounds in used] == [("train", 3), ("test", 1)]
    assert len(echo.read_rows(out / "sft.jsonl")) == 18  # all are sound
    kinds = {e["kind"] for c in echo.read_rows(out / "clips.jsonl") for e in c["A4_events"]}
    assert kinds == set(KINDS.values())
    (folder / "big_drum").mkdir()
    assert "kind 'big-drum'" in mistake("make_data", *flags)
    shutil.rmtree(folder / "big_drum")
    shutil.rmtree(folder / "gong")
    assert "4 folders" in mistake("make_data", *flags)
    (folder / "gong").mkdir()
    assert "0 WAV files" in mistake("make_data", *flags)
    shutil.copy(folder / "e3/0.WAV", folder / "gong")
    good("make_data", *flags)
    assert "needed: at least 2" in mistake("make_data", *flags, "--hold-out", 0.25)


def mistake(name, *args):
    """The one line that a user's mistake ends with."""
    code, _, err = run(name, *args)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "Traceback" not in err
    return line


ROW = {"question": "q", "answer": "a", "audio_path": "x.wav", "multi_choice": ["a", "b"]}


def rows_file(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("content,says", [
    (ROW | {"question": ""}, "row 1: no text under 'question'"),
    (ROW | {"answer": 3}, "row 1: no text under 'answer'"),
    (ROW | {"audio_path": 3}, "row 1: no 'audio_path'"),
    (ROW | {"multi_choice": "ab"}, "row 1: no 'multi_choice'"),
    (ROW | {"multi_choice": [1, 2]}, "row 1: no 'multi_choice'"),
    (ROW | {"answer": "c"}, "row 1: the answer 'c' is not among the choices"),
    (json.dumps(ROW) + '\n{"question": \n', "row 2: not JSON"), ("[1]", "row 1"),
    ('[{"question": "q"', "line 1: not JSON"), ("", "no rows"), ("[]", "no rows"),
    (json.dumps(ROW).encode("utf-16"), "not UTF-8"), (b'{"question": "\xe9"}', "byte 14: not UTF-8")])
def test_broken_rows_are_one_line(tmp_path, content, says):
    file = tmp_path / "rows.jsonl"
    content = json.dumps(content) if isinstance(content, dict) else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EchoError) as error:
        read_questions(file)
    assert says in str(error.value) and "rows.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_as_published(tmp_path):
    """A byte order mark, MMAU's lists of categories, no answers in a benchmark; 3 is no answer."""
    file, text = tmp_path / "rows.json", json.dumps([ROW | {"category": ["Reasoning", "Order"]}])
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    q, = read_questions(file)
    assert (q.category, q.answer, q.path) == ("Reasoning, Order", "a", tmp_path / "x.wav")
    q, = read_questions(rows_file(tmp_path, {k: ROW[k] for k in ROW if k != "answer"}), "/r", ())
    assert (q.category, q.answer, q.path) == ("all", None, Path("/r/x.wav"))
    with pytest.raises(EchoError, match="'answer' is not a text: 3"):
        read_questions(rows_file(tmp_path, ROW | {"answer": 3}), needs=())


def test_clips_are_kept_within_bounds(model, tmp_path, monkeypatch):
    files, read = [tmp_path / f"{i}.wav" for i in range(4)], []
    for i, file in enumerate(files):
        file.write_bytes(make_data.wav_bytes(noise(1.0, i)))
    monkeypatch.setattr(echo, "load_audio", lambda path, rate: read.append(path) or load_audio(path))
    clips = echo.Clips(model, keep_bytes=3 * 2 * 32 * 4)  # three first listens of two tokens
    for _ in range(2):
        for file in files:
            assert torch.equal(clips(file), model.hear([load_audio(file)], True)[0])
            part = load_audio(file)[3200:9600]
            assert torch.equal(clips(file, 0.2, 0.6), model.hear([part])[0])
    assert sum(f.nbytes for f in clips.kept.values()) <= 3 * 2 * 32 * 4
    read.clear()
    roomy = echo.Clips(model)
    assert torch.equal(roomy(files[0]), roomy(files[0])) and len(read) == 1


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


def test_a_folder_that_is_no_checkpoint(model, tmp_path):
    with pytest.raises(EchoError, match="no Echo checkpoint"):
        load(tmp_path)
    save(model, tmp_path / "model")
    (tmp_path / "model/echo.safetensors").write_bytes(b"half")
    with pytest.raises(EchoError, match="broken checkpoint"):
        load(tmp_path)


# ----------------------------------------------------------------------- the scripts, end to end

STEPS = ["--encoder-steps", 4, "--encoder-clips", 8, "--caption-steps", 3, "--instruct-steps", 3,
         "--align-batch", 2, "--sft-steps", 4, "--sft-batch", 2, "--log-every", 1]
RL = ["--steps", 3, "--questions", 2, "--group", 2, "--max-new-tokens", 12, "--eval-questions", 3,
      "--eval-every", 2]


def sft_flags(data, out, *more, test="none"):
    return ["--data", data / "sft.jsonl", "--clips", data / "clips.jsonl", "--out", out,
            "--test", test, *STEPS, *more]


def rl_flags(data, model, out, *more, test="none"):
    return ["--model", model, "--data", data / "rl.jsonl", "--out", out, "--test", test, *RL, *more]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    parts = ("echo.safetensors", "model.safetensors")
    return {k: v for part in parts for k, v in echo.load_file(folder / "model" / part).items()}


@pytest.fixture(scope="session")
def trained(world):
    """All stages at micro size, by the scripts: the folder of their folders."""
    data, runs = world / "data", world / "runs"
    good("train_sft", *sft_flags(data, runs, test=data / "test.jsonl"))
    good("train_rl", *rl_flags(data, runs / "sft", runs / "rl", test=data / "test.jsonl"))
    return runs


def test_training_scripts(world, trained, tmp_path):
    data, log = world / "data", log_of(trained / "rl")
    steps = [e for e in log if "reward" in e]
    assert [e["step"] for e in steps] == [1, 2, 3]
    for entry in steps:
        parts = [entry[k] for k in ("format", "consistency", "accuracy", "segment")]
        assert entry["reward"] == pytest.approx(sum(parts), abs=1e-4)
        assert all(math.isfinite(v) for v in entry.values())
    evaluated = [e for e in log if "eval_accuracy" in e]
    assert [e["step"] for e in evaluated] == [0, 2, 3] and "eval_count_after" in evaluated[0]
    assert "eval_accuracy" in log_of(trained / "sft")[-1]
    assert (trained / "rl/report.html").is_file() and not (trained / "rl/saves").exists()
    before = weights(trained / "sft")  # finished stages are skipped, or trained again, alike
    flags = sft_flags(data, trained, test=data / "test.jsonl")
    assert good("train_sft", *flags).count("already trained") == 3
    for stage in ("base", "sft"):
        shutil.copytree(trained / stage, tmp_path / stage)
    again = good("train_sft", *sft_flags(data, tmp_path, "--stage", "sft", "--retrain"))
    assert "already" not in again and "step 4" in again
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "sft").items())


def test_every_metric_is_defined(trained):
    logged = {k for run in ("encoder", "base", "sft", "rl") for e in log_of(trained / run) for k in e}
    for key in {k.removeprefix("eval_") for k in logged - {"step"}}:
        assert key in generate.METRICS or key.startswith("rejected_") and "rejected" in \
            generate.METRICS, key
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (HERE / "README.md").read_text(), re.M))
    for name, definition in generate.METRICS.items():
        if not name.startswith("rejected_"):
            assert table.get(name, "").replace("`", "") == definition, name


def test_encoder_stays_frozen_after_its_own_stage(trained):
    first, *later = (weights(trained / stage) for stage in ("encoder", "base", "sft", "rl"))
    for name in [k for k in first if k.startswith("encoder.")]:
        assert all(torch.equal(first[name], w[name]) for w in later), name
    assert not torch.equal(first["projector.weight"], later[2]["projector.weight"])


def test_generate_on_a_foreign_clip(world, trained, tmp_path, monkeypatch):
    """Another rate, stereo: an answer in JSON, and the stream."""
    t = np.arange(3 * 44_100) / 44_100
    wave = np.stack([np.sin(2 * np.pi * 300 * t), np.sin(2 * np.pi * 500 * t)], 1)
    raw = (wave * 8000).astype("<i2").tobytes()
    (tmp_path / "my clip.wav").write_bytes(wav(raw, 44_100, 2))
    flags = [tmp_path / "my clip.wav", "Which sound?", "--choices", "bell", "a hiss", "--model",
             trained / "rl"]
    got = json.loads(good("generate", *flags, "--json"))
    assert set(got) == {"answer", "response", "segments", "ended"}
    said = good("generate", *flags)
    assert "answer:" in said and "Which sound? bell, a hiss" in said and "(3.0 s)" in said
    monkeypatch.chdir(world)  # without a clip: a held-out one of the toy
    assert "truth:" in good("generate")


def test_benchmark_files(world, trained, tmp_path, monkeypatch):
    """MMAR and MMAU rows come back whole with the evaluators' keys; broken audio is named and
    counted; an interrupted run goes on, with the same settings alone."""
    rows = echo.read_rows(world / "data/test.jsonl")[:5]
    mmar = [{"id": i, "audio_path": "./" + r["audio_path"], "question": r["question"],
             "choices": r["multi_choice"], "answer": r["answer"], "modality": "sound",
             "category": "x", "sub-category": "y"} for i, r in enumerate(rows)]
    mmar[2]["audio_path"] = "audio/gone.wav"
    mmau = [{"id": str(i), "audio_id": r["audio_path"], "question": r["question"], "task": "sound",
             "choices": r["multi_choice"], "answer": r["answer"]} for i, r in enumerate(rows)]
    for name, content in (("mmar", mmar), ("mmau", mmau)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def flags(name, out):
        return ["--benchmark", tmp_path / f"{name}.json", "--audio-root", world / "data", "--batch",
                2, "--output", tmp_path / out, "--model", trained / "rl"]
    code, out, err = run("generate", *flags("mmar", "out.json"))
    assert code == 1 and "1 of 5 rows" in err and "gone.wav" in out
    done = json.loads((tmp_path / "out.json").read_text())
    assert [{k: v for k, v in d.items() if k in m} for d, m in zip(done, mmar)] == mmar
    for d in done:
        said = echo.extract_answer(d["response"]) or ""
        assert d["answer_prediction"] == d["model_output"] == said
    assert done[2]["answer_prediction"] == "" and not (tmp_path / "out.json.part").exists()
    good("generate", *flags("mmau", "whole.json"))
    real, part = generate.answer_batch, tmp_path / "again.json.part"

    def answer_batch(model, questions, settings):  # Ctrl-C in the second batch
        if questions[0].row["id"] == "2":
            raise KeyboardInterrupt
        return [row | {"mark": 1} for row in real(model, questions, settings)]
    monkeypatch.setattr(generate, "answer_batch", answer_batch)
    assert run("generate", *flags("mmau", "again.json"))[0] == 130
    monkeypatch.setattr(generate, "answer_batch", real)
    part.write_text(part.read_text() + '{"id": "2", "audio')
    assert "max_new_tokens" in mistake("generate", *flags("mmau", "again.json"), "--max-new-tokens", 9)
    assert "audio_root" in mistake("generate", *flags("mmau", "again.json"), "--audio-root", "/")
    good("generate", *flags("mmau", "again.json"))
    again, whole = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("again", "whole"))
    assert [r.pop("mark", None) for r in again] == [1, 1, None, None, None]
    assert [r["response"] for r in again] == [r["response"] for r in whole]


def test_interval_of_a_share():
    for right, n in ((0, 5), (5, 5), (0, 600), (600, 600), (413, 600)):
        low, high = generate.interval(right, n)
        p = right / n  # the ends of Wilson's interval are the shares that lie 1.96 sd from p
        for end in {low, high} - {0.0, 1.0}:
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-6)
        assert 0 <= low <= p <= high <= 1 and math.copysign(1, low) == 1


@pytest.mark.parametrize("name,args,says", [
    ("generate", ["nowhere.wav", "q?"], "nowhere.wav: no such file"),
    ("generate", ["nowhere.wav"], "no question"),
    ("generate", ["a.wav", "q " * 60_000], "shorten"),
    ("generate", ["--model", "nowhere"], "no Echo checkpoint"),
    ("generate", ["--report", "nowhere"], "no log.jsonl"),
    ("train_rl", ["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ("train_rl", ["--reward", "nothing"], "--reward nothing: must be one of"),
    ("train_rl", ["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ("train_rl", ["--data", "a.wav"], "not UTF-8"),
    ("train_rl", ["--temperature", "0"], "--temperature 0.0: must be above 0"),
    ("train_rl", ["--questions", "3"], "multiple of --mini-batches x processes"),
    ("train_sft", ["--stage", "third"], "--stage third: must be"),
    ("train_sft", ["--dtype", "fp16"], "--dtype fp16: must be"),
    ("train_sft", ["--train", "all", "--stage", "align"], "--train all: must be"),
    ("train_sft", ["--decoder", "nowhere/qwen"], "neither a folder here nor reachable"),
    ("train_sft", ["--device", "cuda:9"], "--device cuda:9"),
    ("make_data", ["--qa-faults", "2"], "--qa-faults and --cot-faults"),
    ("make_data", ["--sounds", "nowhere"], "--sounds nowhere: 0 folders")])
def test_a_users_mistake_is_one_line(world, trained, tmp_path, monkeypatch, name, args, says):
    """The flags that the mistake is not about are good ones."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(wav(b"\xff\x01" * 16_000))
    data, flags = world / "data", {"make_data": ["--out", "data"], "generate": ["--model", trained / "rl"]}
    if name == "train_sft":
        shutil.copytree(trained / "encoder", "runs/encoder")
        flags = sft_flags(data, "new" if "--decoder" in args else "runs")
    elif name == "train_rl":
        flags = rl_flags(data, trained / "sft", "rl")
    else:
        flags = flags[name]
    assert says in mistake(name, *flags, *args)


def test_a_mistake_of_a_process():
    script = process("generate.py", "--model", "nowhere")
    out, err = script.communicate()
    assert script.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_other_settings_do_not_go_on_with_a_run(world, trained):
    flags = rl_flags(world / "data", trained / "sft", trained / "rl", test=world / "data/test.jsonl")
    assert "already trained" in good("train_rl", *flags, "--save-every", 7)
    assert "was begun with lr = " in mistake("train_rl", *flags, "--lr", 1)


# ------------------------------------------------------------------- kills and several processes

def test_killed_and_run_again_ends_with_the_same_weights(world, trained, tmp_path):
    """SIGTERM, Ctrl-C and SIGKILL in the middle of SFT and of RL: the same command goes on and ends
    where the uninterrupted run ended."""
    data, jobs = world / "data", {}
    for out in (tmp_path / "whole", tmp_path / "killed"):
        shutil.copytree(trained / "base", out / "base")
        more = ["--stage", "sft", "--save-every", 1]
        jobs[out / "sft"] = ["train_sft", *sft_flags(data, out, *more, "--sft-steps", 60)]
        jobs[out / "rl"] = ["train_rl", *rl_flags(data, trained / "sft", out / "rl", "--steps", 30,
                                                  "--save-every", 1)]
    killed = [folder for folder in jobs if "killed" in str(folder)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        running = {}
        for folder in killed:
            name, *args = jobs[folder]
            seen = set((folder / "saves").glob("step-??????"))
            running[folder / "saves"] = process(f"{name}.py", *args), seen
        while running:
            for saves, (script, seen) in list(running.items()):
                if set(saves.glob("step-??????")) - seen:
                    script.send_signal(number)
                    _, err = script.communicate()
                    assert script.returncode == (130 if number == signal.SIGINT else -number), err
                    del running[saves]
    for folder in killed:  # what a kill in the middle of a save and of a line leaves
        (folder / "saves/step-999999.tmp").mkdir()
        (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text() + '{"step": 9')
    for folder, job in jobs.items():
        good(*job)
    for name in ("sft", "rl"):
        one, two = (weights(tmp_path / out / name) for out in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
        one, two = (untimed(log_of(tmp_path / out / name)) for out in ("whole", "killed"))
        assert one == two


def untimed(log):
    """The entries of a log without what depends on the machine."""
    free = ("seconds", "decoding_share", "responses_per_s", "tokens_per_s", "padding", "eval_padding")
    return [{k: v for k, v in entry.items() if k not in free} for entry in log]


BOTH = """import json, sys
sys.path.insert(0, sys.argv[1])
import echo, train_rl, train_sft
for name, *args in json.loads(sys.argv[2]):
    sys.argv = [name, *args]
    try:
        {"train_sft": train_sft, "train_rl": train_rl}[name].run()
    except echo.EchoError as error:
        print(error)
"""


def test_two_processes_equal_one(world, trained, tmp_path):
    """The same global batch on one and on two gloo processes: the same log and the same weights,
    but for those whose gradient is near 0, where Adam's first step is the sign of a rounding."""
    data, jobs = world / "data", []
    test = data / "test.jsonl"
    for out in (tmp_path / "1", tmp_path / "2"):
        shutil.copytree(trained / "base", out / "base")
        sft = ["--stage", "sft", "--sft-steps", 1]
        jobs += [["train_sft", *sft_flags(data, out, *sft)],
                 ["train_rl", *rl_flags(data, trained / "sft", out / "rl", "--steps", 1,
                                        "--questions", 4, test=test)]]
    shutil.copytree(trained / "base", tmp_path / "3/base")
    few = [["train_sft", *sft_flags(data, tmp_path / "3", *sft, "--sft-batch", 1)],
           ["train_rl", *rl_flags(data, trained / "sft", tmp_path / "3/rl")]]
    good(*jobs[0])
    good(*jobs[1])
    (tmp_path / "both.py").write_text(BOTH)
    script = process("-m", "torch.distributed.run", "--nproc_per_node=2",
                     f"--master_port={random.randrange(20_000, 40_000)}", tmp_path / "both.py", HERE,
                     json.dumps([list(map(str, job)) for job in jobs[2:] + few]))
    out, err = script.communicate()
    assert script.returncode == 0, err[-2000:]
    assert out.count("2 processes for a batch of 1") == 2 == out.count("must be a multiple of")
    for name, start in (("sft", "base"), ("rl", "sft")):
        before, one, two = map(weights, (trained / start, tmp_path / "1" / name, tmp_path / "2" / name))
        apart, learned = (sum(((w[k] - one[k]) ** 2).sum() for k in one) for w in (two, before))
        assert apart < 1e-4 * learned and learned > 0
        one, two = (untimed(log_of(tmp_path / n / name)) for n in "12")
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert a == pytest.approx(b, abs=3e-5)
