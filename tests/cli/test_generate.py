"""`fastvlm generate`: where the prompt and the pictures come from, and what is printed."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hub_server import HubServer, repo

import fastvlm_mlx as fv
from fastvlm_mlx.events import Stats
from tests.cli.command import Run, spawn, wait

DEMO = ("--model", "demo")
QUESTION = ("-p", "What is this?")


@pytest.fixture(scope="module")
def engine() -> fv.Engine:
    return fv.load("demo")


def test_it_prints_the_engines_answer_and_a_line_end(
    run: Run, engine: fv.Engine, red_circle: Path
) -> None:
    ran = run("generate", red_circle, *QUESTION, *DEMO)
    assert ran.code == 0 and ran.err == ""
    assert ran.out == engine.generate("What is this?", images=[red_circle]).text + "\n"


def test_the_default_model_is_the_demo_and_says_so_in_one_line(run: Run, red_circle: Path) -> None:
    ran = run("generate", red_circle, *QUESTION)
    assert ran.out == run("generate", red_circle, *QUESTION, *DEMO).out
    assert ran.err.count("\n") == 1
    assert "demo model" in ran.err and "--model apple/FastVLM-0.5B" in ran.err


def test_the_environment_chooses_the_model_and_the_option_overrules_it(
    run: Run, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_MODEL", str(endless))
    few = ("-p", "hi", "--json", "--max-tokens", 2)
    assert json.loads(run("generate", *few).out)["model"] == str(endless)
    assert json.loads(run("generate", *few, *DEMO).out)["model"] == "demo"


def test_the_default_prompt_is_describe_the_image(run: Run, red_circle: Path) -> None:
    asked = run("generate", red_circle, "-p", "Describe the image.", *DEMO, "--json")
    unasked = run("generate", red_circle, *DEMO, "--json")
    assert json.loads(unasked.out)["token_ids"] == json.loads(asked.out)["token_ids"]


def test_a_picture_is_the_same_from_a_file_stdin_and_a_data_uri(run: Run, red_circle: Path) -> None:
    raw = red_circle.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(raw).decode()
    outs = {
        run("generate", red_circle, *QUESTION, *DEMO).out,
        run("generate", "-", *QUESTION, *DEMO, stdin=raw).out,
        run("generate", uri, *QUESTION, *DEMO).out,
    }
    assert len(outs) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_every_picture_takes_its_positions(run: Run, red_circle: Path, count: int) -> None:
    words = (*[red_circle] * count, *QUESTION, *DEMO, "--json", "--max-tokens", 1)
    alone = json.loads(run("generate", *QUESTION, *DEMO, "--json", "--max-tokens", 1).out)
    given = json.loads(run("generate", *words).out)
    added = given["stats"]["prompt_tokens"] - alone["stats"]["prompt_tokens"]
    assert added == count * (16 + 1)  # 256 pixels are 16 tokens, and a line end


@pytest.mark.parametrize(
    "content", [b"What is this?", b"What is this?\n", b"\xef\xbb\xbfWhat is this?"]
)
def test_a_prompt_file_is_the_prompt_without_its_last_line_end(
    run: Run, red_circle: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    json_out = (*DEMO, "--json")
    read = run("generate", red_circle, "--prompt-file", tmp_path / "prompt.txt", *json_out)
    typed = run("generate", red_circle, *QUESTION, *json_out)
    assert _settled(read.out) == _settled(typed.out)


def _settled(out: str) -> dict[str, object]:
    answer = json.loads(out)
    return {**answer, "stats": answer["stats"]["prompt_tokens"]}


def test_json_is_one_object_with_every_field_of_stats(run: Run, red_circle: Path) -> None:
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--json")
    assert ran.err == "" and ran.out.count("\n") == 1
    answer = json.loads(ran.out)
    assert list(answer) == ["text", "token_ids", "finish_reason", "model", "stats"]
    assert list(answer["stats"]) == [field.name for field in fields(Stats)]
    assert answer["finish_reason"] == "stop" and answer["model"] == "demo"
    assert answer["stats"]["ttft_ms"] > 0 and answer["stats"]["vision_ms"] is None
    assert answer["stats"]["generated_tokens"] == len(answer["token_ids"])


def test_json_with_stats_has_the_stages_and_no_ttft(run: Run, red_circle: Path) -> None:
    """A fenced run is slower, so what it measures must not pass for TTFT."""
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--json", "--stats")
    stats = json.loads(ran.out)["stats"]
    assert ran.err == ""
    assert stats["ttft_ms"] is None
    assert all(stats[f"{stage}_ms"] > 0 for stage in ("preprocess", "vision", "prefill"))


def test_logprobs_come_one_a_token(run: Run, red_circle: Path) -> None:
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--json", "--logprobs")
    answer = json.loads(ran.out)
    assert len(answer["logprobs"]) == len(answer["token_ids"])
    assert all(value <= 0 for value in answer["logprobs"])


def test_stats_are_a_table_on_stderr_and_the_answer_stays_alone_on_stdout(
    run: Run, red_circle: Path
) -> None:
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--stats")
    assert ran.out == run("generate", red_circle, *QUESTION, *DEMO).out
    names = [line[:12].strip() for line in ran.err.splitlines()]
    assert names == [
        "image decode", "preprocess", "vision", "projector", "prompt", "prefill", "first token",
        "in all", "decode", "peak memory",
    ]  # fmt: skip
    times = [float(ms) for ms in re.findall(r"(\d+\.\d) ms", ran.err)]
    assert times[-1] == pytest.approx(sum(times[:-1]), abs=0.3)
    assert "each stage waited for" in ran.err


def test_an_answer_cut_short_says_so_and_why(run: Run, endless: Path) -> None:
    cut = run("generate", "-p", "hi", "--model", endless, "--max-tokens", 3)
    assert cut.code == 0
    assert cut.err == "fastvlm: the answer was cut at --max-tokens 3\n"


def test_sampling_options_reach_the_sampler(run: Run, red_circle: Path, endless: Path) -> None:
    warm = ("-p", "hi", "--model", endless, "--json", "--temperature", 1, "--max-tokens", 12)

    def ids(*words: object) -> list[int]:
        return json.loads(run("generate", *warm, *words).out)["token_ids"]

    assert ids("--seed", 1) == ids("--seed", 1) != ids("--seed", 2)
    assert len(set(ids("--seed", 1, "--top-k", 1))) == 1  # all logits are equal, yet one is kept


def test_the_repetition_penalty_reaches_the_sampler(run: Run) -> None:
    words = ("-p", "Say one one one", *DEMO, "--json", "--max-tokens", 30)
    plain = json.loads(run("generate", *words).out)["token_ids"]
    assert json.loads(run("generate", *words, "--repetition-penalty", 5).out)["token_ids"] != plain


def test_sampling_options_without_temperature_are_warned_about(run: Run) -> None:
    ran = run("generate", "-p", "hi", *DEMO, "--top-p", 0.5, "--max-tokens", 1)
    assert ran.code == 0
    assert ran.err.splitlines()[0] == (
        "fastvlm: warning: --top-p, --top-k and --min-p do nothing without --temperature"
    )


def test_a_stop_string_ends_the_answer_and_is_not_shown(run: Run, red_circle: Path) -> None:
    whole = run("generate", red_circle, *QUESTION, *DEMO).out.strip()
    first, word = whole.split()[:2]
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--stop", "nowhere", "--stop", word)
    assert ran.out == f"{first} \n"


def test_beams_give_the_engines_beam_answer(run: Run, engine: fv.Engine, red_circle: Path) -> None:
    ran = run("generate", red_circle, *QUESTION, *DEMO, "--num-beams", 3)
    assert ran.code == 0
    best = engine.generate("What is this?", images=[red_circle], num_beams=3)
    assert ran.out == best.text + "\n"


def test_the_system_turn_can_be_changed_or_left_out(run: Run) -> None:
    words = ("-p", "hi", *DEMO, "--json", "--max-tokens", 1)

    def positions(*more: object) -> int:
        return json.loads(run("generate", *words, *more).out)["stats"]["prompt_tokens"]

    usual = positions()
    assert positions("--system", "You are a helpful assistant.") == usual
    assert positions("--system", "") < usual < positions("--system", "Answer in rhymes, always.")


def test_resolution_changes_the_number_of_tokens(run: Run, red_circle: Path) -> None:
    words = (red_circle, *QUESTION, *DEMO, "--json", "--max-tokens", 1)

    def positions(*more: object) -> int:
        return json.loads(run("generate", *words, *more).out)["stats"]["prompt_tokens"]

    assert positions("--resolution", 128) == positions() - 16 + 4


def test_dtype_device_and_memory_limit_are_heard(run: Run) -> None:
    words = ("generate", "-p", "hi", *DEMO, "--max-tokens", 1, "-v", "--device", "cpu")
    assert "computing in float32" in run(*words).err
    assert "computing in bfloat16" in run(*words, "--dtype", "bfloat16").err
    assert run(*words, "--memory-limit", "8GB").code == 0


@pytest.fixture
def hub() -> HubServer:
    from tests.cli.command import DEMO as FOLDER

    files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}
    server = HubServer({"org/demo": repo(files)})
    yield server
    server.close()


@pytest.mark.slow
def test_a_hub_name_is_downloaded_with_its_size_said_first(
    run: Run, hub: HubServer, red_circle: Path, tmp_path: Path
) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    words = ("generate", red_circle, *QUESTION, "--model", "org/demo")
    first = wait(spawn(*words, env=environment))
    assert first.code == 0, first
    assert re.fullmatch(r"fastvlm: Downloading org/demo \(4\.\d+ MB\)\n", first.err)
    assert first.out == run("generate", red_circle, *QUESTION, *DEMO).out
    offline = wait(spawn(*words, env=environment | {"HF_HUB_OFFLINE": "1"}))
    assert (offline.code, offline.out, offline.err) == (0, first.out, "")


def test_preview_of_a_hub_name_fetches_its_config_alone(
    hub: HubServer, red_circle: Path, tmp_path: Path
) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    out = tmp_path / "seen.png"
    ran = wait(spawn("preview", red_circle, "-o", out, "--model", "org/demo", env=environment))
    assert ran.code == 0 and out.exists(), ran
    assert {Path(request.path).name for request in hub.requests} == {"config.json"}
