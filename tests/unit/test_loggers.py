"""Where numbers go: metrics.jsonl under kills and resumes, wandb read back, TensorBoard, plots."""

from __future__ import annotations

import json
import re
import time

import pytest

from fa3_train.train.compose import load
from fa3_train.train.config import ConfigError
from fa3_train.train.loggers import RunLogger, prepare_metrics, short_line, step_line
from fa3_train.train.plots import draw, read_metrics

INFO = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "gpus": 1,
    "peak_bf16_flops": 989.5e12,
    "peak_source": "a datasheet",
    "parameters": 4_000_000,
    "formulas": {"mfu_causal": "6 N tokens"},
}


def config(folder, *words):
    return load(["logging.wandb=off", f"run.dir='{folder}'", "logging.progress=plain", *words])


def record(step, **values):
    return {
        "step": step,
        "loss": 8.0 - step / 10,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 1000,
        "tokens_total": 1000 * step,
        "tokens_per_s": 5000.0,
        "tokens_per_s_per_gpu": 5000.0,
        "step_ms": 200.0,
        "data_ms": 1.0,
        "forward_ms": 60.0,
        "backward_ms": 120.0,
        "optimizer_ms": 10.0,
        "other_ms": 9.0,
        "tflops_per_gpu": 400.0,
        "mfu_causal": 0.40,
        "mfu_palm": 0.45,
        "attention_share": None,
        "peak_memory_gib": 10.0,
        **values,
    }


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl ----------------------------------------------------------------------------


def test_every_step_and_event_is_a_line(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    logger.event("eval", step=0, val_loss=8.3)
    logger.log([record(1), record(2)])
    paths = logger.close()
    rows = lines(tmp_path)
    assert [row.get("event") for row in rows] == ["run", "eval", None, None]
    assert rows[0]["formulas"] == INFO["formulas"]
    assert rows[0]["config"]["data"]["seq_len"] == 256
    assert rows[2]["loss"] == 7.9 and rows[2]["attention_share"] is None
    assert paths["metrics"] == str(tmp_path / "metrics.jsonl")
    assert (tmp_path / "config.yaml").read_text().startswith("recipe: quickstart")


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    logger.log([record(1)])
    assert lines(tmp_path)[-1]["step"] == 1
    logger.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    logger.log([record(1, loss=float("nan"), grad_norm=float("inf"))])
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path)[1]["loss"] is None and lines(tmp_path)[1]["grad_norm"] is None


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    logger.log([record(n) for n in (1, 2, 3, 4)])
    logger.event("eval", step=4, val_loss=1.0)
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')
    logger = RunLogger(config(tmp_path), INFO, start_step=2)
    logger.log([record(3, loss=0.5)])
    logger.close()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if "event" not in row] == [1, 2, 3]
    assert [row["start_step"] for row in rows if row.get("event") == "run"] == [0, 2]
    assert not any(row.get("event") == "eval" for row in rows)
    assert rows[-1]["loss"] == 0.5


def test_fresh_run_in_a_used_folder_keeps_the_old_numbers(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        logger = RunLogger(config(tmp_path), INFO)
        logger.log([record(1, loss=loss)])
        logger.close()
    found = {
        path.name: json.loads(path.read_text().splitlines()[1])["loss"]
        for path in tmp_path.glob("metrics*.jsonl")
    }
    assert found == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_a_file_that_is_not_metrics_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(ConfigError, match="line 2"):
        prepare_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\nhello\n'


def test_other_ranks_write_nothing(tmp_path):
    logger = RunLogger(config(tmp_path / "run"), INFO, rank=1, state={"wandb_id": "x"})
    logger.log([record(1)])
    logger.event("eval", step=1, val_loss=1.0)
    logger.message("hello")
    assert logger.close() == {} and logger.state() == {"wandb_id": "x"}
    assert list(tmp_path.iterdir()) == []


# ---- terminal ---------------------------------------------------------------------------------


def test_plain_lines(tmp_path, capsys):
    logger = RunLogger(config(tmp_path), INFO)
    logger.log([record(n) for n in range(1, 11)])
    logger.event("eval", step=10, val_loss=7.1234567)
    logger.close()
    out = capsys.readouterr().out
    assert "989.5 TFLOP/s bf16 (a datasheet)" in out
    step = next(line for line in out.splitlines() if line.startswith("step  10/400"))
    for part in ("loss 7.0000", "5,000 tok/s", "mfu_causal 40.0%", "200 ms", "fwd 60", "10.00 GiB"):
        assert part in step
    assert "step 10  eval  val_loss 7.1235" in out
    assert "\x1b" not in out


def test_line_averages_rates_over_time():
    slow = record(1, step_ms=900.0, mfu_causal=0.1)
    fast = record(2, step_ms=100.0, mfu_causal=0.9, attention_share=0.25)
    line = step_line([slow, fast], 2)
    assert "2,000 tok/s" in line and "mfu_causal 18.0%" in line and "attention 25.0%" in line


def test_live_line_fits_beside_the_bar():
    records = [record(n, attention_share=0.251, tokens=1_000_000) for n in (1, 2)]
    line = short_line(records)
    assert line == "loss 7.800  5,000,000 tok/s  mfu 40.0%  200 ms  attn 25%" and len(line) < 62


def test_unknown_peak_is_said_not_guessed(tmp_path, capsys):
    logger = RunLogger(config(tmp_path), {**INFO, "peak_bf16_flops": None})
    logger.log([record(1, mfu_causal=None)])
    logger.close()
    out = capsys.readouterr().out
    assert "n/a: the peak of this device is not in the table" in out and "mfu_causal n/a" in out


def test_a_recipe_off_its_size_says_so(tmp_path, capsys):
    RunLogger(config(tmp_path, "run.gpus=8"), INFO).close()
    assert "sized for 8 GPUs and runs on 1" in capsys.readouterr().out


def test_rich_progress_keeps_messages(tmp_path, capsys):
    logger = RunLogger(config(tmp_path, "logging.progress=rich"), INFO)
    logger.log([record(1)])
    logger.event("eval", step=1, val_loss=7.5)
    logger.close()
    assert "val_loss 7.5000" in capsys.readouterr().out


# ---- plots ------------------------------------------------------------------------------------


def test_plots_are_pictures(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    logger.log([record(n) for n in range(1, 20)])
    logger.event("eval", step=19, val_loss=6.0)
    paths = logger.close()
    assert paths["plot"].endswith("loss.png")
    for name in ("plot", "throughput"):
        with open(paths[name], "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    info, steps, evals = read_metrics(tmp_path / "metrics.jsonl")
    assert info["name"] == "quickstart" and len(steps) == 19 and evals[0]["val_loss"] == 6.0


def test_nothing_to_plot(tmp_path):
    logger = RunLogger(config(tmp_path), INFO)
    assert "plot" not in logger.close()
    assert draw(tmp_path / "metrics.jsonl") == []


def test_metrics_of_another_kind_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:1")):
        read_metrics(path)


# ---- wandb and TensorBoard --------------------------------------------------------------------


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_mode_follows_the_login(no_login, monkeypatch, tmp_path):
    from fa3_train.train.wandb_logger import resolve_mode

    assert resolve_mode("auto") == "offline"
    assert resolve_mode("offline") == "offline"
    with pytest.raises(ConfigError, match="logging.wandb=online needs a login"):
        resolve_mode("online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "off"


def read_wandb(folder, count, patience_s=30):
    """History rows, config keys and run ids of the offline runs under `folder`.

    wandb's own process may still be writing when `finish` has returned: it gets time to bring the
    rows to `count`.
    """
    end = time.monotonic() + patience_s
    while len((found := _scan_wandb(folder))[0]) < count and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _scan_wandb(folder):
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    rows, configs, ids = [], set(), []
    # Two runs in one second differ by a suffix of the folder, so the names order them.
    paths = folder.glob("wandb/offline-run-*/run-*.wandb")
    for path in sorted(paths, key=lambda path: path.parent.name):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            if entry.WhichOneof("record_type") == "run":
                ids.append(entry.run.run_id)
                configs |= {item.key for item in entry.run.config.update}
            elif entry.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in entry.history.item
                    }
                )
    return rows, configs, ids


def test_offline_run_reads_back(no_login, tmp_path):
    words = ["logging.wandb=auto"]
    logger = RunLogger(config(tmp_path, *words), INFO)
    logger.log([record(1), record(2, attention_share=0.2)])
    logger.event("eval", step=2, val_loss=6.5)
    state = logger.state()
    paths = logger.close()
    assert "wandb sync" in paths["wandb"]
    rows, keys, ids = read_wandb(tmp_path, 3)
    assert {"model", "data", "machine"} <= keys
    assert [row["step"] for row in rows] == [1, 2, 2]
    overview = [name for name in rows[1] if name.startswith("1_overview/")]
    assert sorted(overview) == [
        f"1_overview/{name}"
        for name in ("attention_share", "loss", "mfu_causal", "peak_memory_gib", "tokens_per_s")
    ]
    assert rows[0]["1_overview/loss"] == 7.9 and "1_overview/attention_share" not in rows[0]
    assert rows[2]["1_overview/val_loss"] == 6.5
    assert state["wandb_id"] == ids[0]

    # A resumed run goes on under the same id.
    logger = RunLogger(config(tmp_path, *words), INFO, start_step=2, state=state)
    logger.log([record(3)])
    assert logger.state() == state
    logger.close()
    rows, _, ids = read_wandb(tmp_path, 4)
    assert set(ids) == {state["wandb_id"]} and rows[-1]["step"] == 3


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunLogger(config(tmp_path, "logging.tensorboard=true"), INFO)
    logger.log([record(1), record(2)])
    logger.event("eval", step=2, val_loss=6.5)
    paths = logger.close()
    events = EventAccumulator(paths["tensorboard"])
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 7.9), (2, 7.8)]
    assert [e.step for e in events.Scalars("val_loss")] == [2]


def test_digest_of_a_run(tmp_path, capsys):
    from fa3_train.train import plots

    logger = RunLogger(config(tmp_path), INFO)
    logger.event("eval", step=0, val_loss=8.0)
    logger.log([record(n, step_ms=100.0 * n) for n in (1, 2, 3)])
    logger.close()
    source, prefix = tmp_path / "metrics.jsonl", tmp_path / "out"
    assert plots.main([str(source), str(prefix)]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["training_s"] == pytest.approx(0.6)
    assert result["medians"]["step_ms"] == 200.0
    assert result["loss"] == [7.9, 7.8, 7.7]
    assert result["evaluations"] == [{"step": 0, "val_loss": 8.0}]
    assert result["command"] == "python -m fa3_train recipe=quickstart"
    assert (tmp_path / "out_loss.png").exists() and (tmp_path / "out_throughput.png").exists()
    assert plots.main([]) == 2
