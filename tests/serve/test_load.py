"""`python -m eval load` against a real server."""

import json
import math

import numpy as np
import pytest

from eval.__main__ import main
from eval.methods import traffic
from tests.support.server import also


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(["load", *map(str, args)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_server_under_load(toy_server, tmp_path, capsys):
    out, url = tmp_path / "plots", f"{toy_server.url}/v1"
    args = ["--url", url, "--rates", "200,inf", "--requests", "10", "--max-new-tokens", "8", "--out", out]
    main(["load", *map(str, args), "--json", str(tmp_path / "load.json")])
    figures = json.loads((tmp_path / "load.json").read_text())
    assert [row["rate"] for row in figures["rates"]] == [200, None] and figures["model"] == "toy"
    for row in figures["rates"]:
        assert row["answered"] == row["requests"] == 10 and row["errors"] == {}
        assert 10 <= row["tokens"] <= 80 and row["tokens_per_second"] > 0
        assert 0 < row["first_token"]["p50"] <= row["first_token"]["p99"] <= row["whole"]["p99"]
    assert (out / "load.png").stat().st_size > 1000 and "10 of 10" in capsys.readouterr().out


def test_errors_are_counted(toy_server, tmp_path):
    file = tmp_path / "load.json"
    args = ["--url", f"{toy_server.url}/v1", "--requests", "30", "--max-new-tokens", "90", "--json", str(file)]
    main(["load", *args])
    (row,) = json.loads(file.read_text())["rates"]
    assert row["errors"] == {"status 429": 30 - row["answered"]} and 12 <= row["answered"] < 30


def test_what_is_refused(toy_server, capsys, monkeypatch):
    url = f"{toy_server.url}/v1"
    assert "--rates" in refusal(capsys, "--url", url, "--rates", "1,0")
    assert "--model gpt-4" in refusal(capsys, "--url", url, "--model", "gpt-4")
    assert "--requests 0" in refusal(capsys, "--url", url, "--requests", 0)
    assert "no server" in refusal(capsys, "--url", "http://127.0.0.1:9/v1")
    with also(toy_server, keys=(b"secret",)) as locked:
        assert "401" in refusal(capsys, "--url", f"{locked.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        main(["load", "--url", f"{locked.url}/v1", "--requests", "1", "--max-new-tokens", "2"])


def test_arrivals_are_at_their_rate():
    times = traffic.arrivals(4.0, 4000, seed=1)
    assert np.all(np.diff(times) > 0) and times[-1] / 4000 == pytest.approx(0.25, rel=0.1)
    assert not traffic.arrivals(math.inf, 5, seed=1).any()


def test_figures_of_one_request():
    met = traffic.Met(sent=1.0, arrivals=[2.0, 3.0, 5.0], tokens=7, ended=5.5)
    assert met.first == 1 and met.gaps == [1, 2] and met.pace == 0.5
    assert traffic.most_at_once([met, traffic.Met(3.0, ended=4.0), traffic.Met(5.6, ended=6.0)]) == 2
