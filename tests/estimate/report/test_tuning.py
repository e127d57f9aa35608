from __future__ import annotations

import json

from lightning_tp.estimate import estimate
from lightning_tp.estimate.report.tuning import Refused, TuningReport
from tests.estimate.models import TOKENS, meta_llama


def test_as_a_table_and_json() -> None:
    one, two = (estimate(meta_llama(2), TOKENS, mesh, accumulate=3) for mesh in ((2, 1), (1, 2)))
    found = TuningReport((one, two), (Refused("tp=4", "it does not divide 2 devices"),), 12, 2)
    lines = str(found).splitlines()
    assert lines[0] == "2 configurations fit on 2 devices at a global batch of 12 samples"
    assert lines[1].split()[:4] == ["tp", "dp", "batch", "accumulate"] and "tokens/s/device" in lines[1]
    assert lines[2].split()[:5] == ["1", "1", "2", "2", "3"] and lines[3].split()[:3] == ["2", "2", "1"]
    assert lines[-2:] == ["Not possible:", "  tp=4: it does not divide 2 devices"]
    values = json.loads(found.to_json())
    assert (values["gpus"], values["global_batch"], values["refused"][0]["what"]) == (2, 12, "tp=4")
    assert [(f["tp"], f["tokens_per_s"], f["step_s"]) for f in values["fits"]] == [
        (e.tp, e.tokens_per_s, e.time.step) for e in (one, two)
    ]
    assert "0 configurations fit" in str(TuningReport((), (), 12, 2))
