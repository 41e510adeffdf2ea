"""After training, best.pt holds the share of start and best weights that scores best on val."""

import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import make_dataset, quick, read_metrics, run_script, same_weights, tiny_model, weights
from test_resume import assert_as_untouched, run_struck

import indofashion_clip as ic


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(a dataset, weights that know some of it)."""
    folder = tmp_path_factory.mktemp("start")
    data = make_dataset(folder / "data", train=44, val=20, test=10)
    run_script(folder / "run", **quick(data, NUM_EPOCHS=8))
    return data, folder / "run/outputs/best.pt"


def fine_tuning(start, **constants):
    data, path = start
    return quick(data, MODEL=str(path), NUM_EPOCHS=3, LR=3e-4, SEED=1) | constants


def test_best_pt_is_never_worse_than_either_end(tmp_path, start):
    output = run_script(tmp_path / "run", **fine_tuning(start))
    *val, test = read_metrics(tmp_path / "run")
    epochs, mixed = [line for line in val if "share" not in line], val[4:]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    best_epoch = max(epochs, key=ic.score)["epoch"]
    assert best_epoch > 0, "the fine-tuning did not help: there is nothing to mix"
    assert [(line["share"], line["epoch"]) for line in mixed] == [
        (share, best_epoch) for share in (0.25, 0.5, 0.75)
    ]
    best = max(val, key=ic.score)
    assert test["split"] == "test" and test["epoch"] == best_epoch
    assert "share" not in best or f"{best['share']} of them with the start's" in output
    # loaded as the start of another run, it does on val what the log says that it did
    again = fine_tuning(start, MODEL=str(tmp_path / "run/outputs/best.pt"), NUM_EPOCHS=1)
    run_script(tmp_path / "again", **again)
    assert ic.score(read_metrics(tmp_path / "again")[0]) == pytest.approx(ic.score(best), abs=1e-6)


@pytest.mark.parametrize("wanted", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_best_share_is_kept(tmp_path, monkeypatch, wanted):
    """Scored by how near the wanted mixture the weights are, each share is found, and nothing beyond."""
    start, best = tiny_model(1), tiny_model(2)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    torch.save(best.state_dict(), tmp_path / "best.pt")
    one, other = (model.visual.proj.detach().clone() for model in (start, best))

    def evaluate(run, _):
        share = ((run.model.visual.proj.detach() - one) / (other - one)).median().item()
        return dict.fromkeys(("accuracy", "image_to_text_r5", "text_to_image_r5"), 1 - abs(share - wanted)), share

    logged = []
    monkeypatch.setattr(ic, "evaluate", evaluate)
    monkeypatch.setattr(ic, "log", lambda run, split, epoch, metrics: logged.append(metrics["share"]))
    run = SimpleNamespace(
        model=best,
        best=tmp_path / "best.pt",
        best_epoch=1,
        best_score=wanted,
        views={},
        settings=SimpleNamespace(MODEL=str(tmp_path / "start.pt")),
    )
    ic.mix_with_start(run, "val")
    assert logged == [0.25, 0.5, 0.75]
    assert run.best_share == (wanted if wanted > 0 else 0.25)
    expected = one + run.best_share * (other - one)
    torch.testing.assert_close(run.model.visual.proj.detach(), expected)
    assert run.views.get("best", 1.0) == pytest.approx(run.best_share)


@pytest.mark.parametrize("what", ["a random start", "no val", "the start is best"])
def test_nothing_is_mixed(tmp_path, start, what):
    constants = {
        "a random start": {"MODEL": "tiny", "NUM_EPOCHS": 2},
        "no val": {"JSON_PATH": str(start[0] / "train_data.json"), "NUM_EPOCHS": 1},
        "the start is best": {"LR": 1.0, "NUM_EPOCHS": 1},
    }[what]
    output = run_script(tmp_path, **fine_tuning(start, **constants))
    assert "The start's weights with" not in output and not any("share" in line for line in read_metrics(tmp_path))
    if what == "the start is best":
        assert same_weights(tmp_path / "outputs/best.pt", start[1])


def test_killed_while_mixing(tmp_path, start):
    """Told to stop, then killed in an evaluation of mixtures, between last.pt and best.pt, and on test."""
    constants = fine_tuning(start)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_struck(tmp_path / "whole", [], **constants)
    kill = signal.SIGKILL.value
    moments = [("encode_split", 6, signal.SIGTERM.value), ("encode_split", 2, kill), ("save_best", 1, kill)]
    _, codes = run_struck(tmp_path / "killed", [*moments, ("encode_split", 1, kill)], **constants)
    assert codes == [143, -9, -9, -9]
    assert_as_untouched(tmp_path / "killed", tmp_path / "whole")


def test_an_rn_model_can_be_mixed(tmp_path, monkeypatch):
    """Its batch norms count in whole numbers, which the mixture must leave whole."""
    torch.manual_seed(0)
    model = ic.clip.model.CLIP(64, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1).eval()
    torch.save(model.state_dict(), tmp_path / "rn.pt")
    monkeypatch.setattr(ic, "evaluate", lambda run, val: (dict.fromkeys(("accuracy", "image_to_text_r5", "text_to_image_r5"), 1.0), None))
    monkeypatch.setattr(ic, "log", lambda *_: None)
    settings = SimpleNamespace(MODEL=str(tmp_path / "rn.pt"))
    run = SimpleNamespace(model=model, best=tmp_path / "rn.pt", best_epoch=1, best_score=0.0, views={}, settings=settings)
    ic.mix_with_start(run, "val")
    before = weights(tmp_path / "rn.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
