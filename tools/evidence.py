"""What the runs of the evidence study say: figures of the arms, claims of the paper, the pages.

A claim of the paper is a sentence about a difference: of an arm over another one, or of an arm over
the policy that training starts from. The rule of the verdict (`verdict`):

* The difference is taken seed by seed. Its mean is "ours", with a 95 % Student-t interval over the
  seeds, each of which counts once.
* "reproduced": the whole interval lies on the paper's side of 0. A claim that something makes no
  difference is reproduced if the whole interval lies within NEGLIGIBLE of 0.
* "not reproduced": any other interval. It may lie on the other side, or be too wide to say.
* "not testable here": the world does not have what the claim is about, or there are fewer than two
  seeds of both arms; "why" says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.statistics import mean_interval, show_interval

REPRODUCED, NOT, UNTESTABLE = "reproduced", "not reproduced", "not testable here"
NEGLIGIBLE = 0.03  # of a gain, whose scale is 0 to 1

Run = Mapping[str, Any]  # of a run, as study.run_record makes it

# ---------------------------------------------------------------- claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and the figures that decide it.

    Attributes:
      claim: the sentence.
      paper: where it stands, with the paper's figures.
      arm: whose runs it is about; "" if no run can say anything.
      over: the arm that it is compared with; "" is the policy that training starts from.
      measure: "gain", a component of the reward, or "TASK: COMPONENT".
      sign: of the difference that the paper claims; 0 is none.
      why: it cannot be tested.
    """

    claim: str
    paper: str
    arm: str = ""
    over: str = ""
    measure: str = "gain"
    sign: int = 1
    why: str = ""


TABLE_1 = "Table 1: LongLive VQ +28 %, MQ +6 %, TA +26 % on long videos"
CLAIMS = (
    Claim("KVPO raises the reward that it optimises", TABLE_1, "KVPO"),
    Claim("and its semantic part", TABLE_1, "KVPO", measure="SC"),
    Claim("and its appearance", TABLE_1, "KVPO", measure="VQ"),
    Claim(
        "what is gained is the reward's doing: shuffled advantages gain less",
        "a control, not in the paper",
        "KVPO",
        "shuffled",
    ),
    Claim(
        "routed history explores better than noise, each with the surrogate that suits it",
        "Section 1, Appendix D.1",
        "KVPO",
        "noise + l2",
    ),
    Claim(
        "routed history explores better than noise, with the same surrogate (l2)",
        "Section 1, Appendix D.1",
        "CHR + l2",
        "noise + l2",
    ),
    Claim(
        "routed history gains more in semantics than noise",
        "Section 4.2",
        "KVPO",
        "noise + l2",
        "SC",
    ),
    Claim(
        "routed history is better than drawn transitions (SDE)",
        "Section 1",
        "KVPO",
        "transition noise + ratio",
    ),
    Claim("TVE is a better surrogate than latent l2", "Table 2", "KVPO", "CHR + l2"),
    Claim("KVPO is better than Astrolabe", "Table 1", "KVPO", "astrolabe"),
    Claim("without a KL training collapses below the base", "Table 3", "beta 0", sign=-1),
    Claim("some KL is better than none", "Table 3", "KVPO", "beta 0"),
    Claim("twice the KL is too conservative", "Table 3", "KVPO", "2 beta"),
    Claim("two perturbed steps are better than one", "Table 2", "KVPO", "1 steps"),
    Claim("two perturbed steps are better than four", "Table 2", "KVPO", "4 steps"),
    Claim("four perturbed steps cost visual quality", "Table 2", "KVPO", "4 steps", "VQ"),
    Claim("6 of 9 routed slots are better than 3", "Table 2", "KVPO", "3 of 9 slots"),
    Claim("6 of 9 routed slots are better than 9", "Table 2", "KVPO", "9 of 9 slots"),
    Claim(
        "a window of random length makes no difference", "Table 2", "random window", "KVPO", sign=0
    ),
    Claim(
        "five perturbed blocks are better than three (old world)",
        "Table 2",
        "5 blocks, old world",
        "KVPO, old world",
    ),
    Claim(
        "seven perturbed blocks are no better than five (old world)",
        "Table 2",
        "7 blocks, old world",
        "5 blocks, old world",
        sign=0,
    ),
    *(
        Claim(sentence, where, why=why)
        for sentence, where, why in (
            (
                "routed histories stay on the manifold of the generator",
                "Section 3.2, Appendix C",
                "routed windows are contexts that this generator was trained on; LongLive's were"
                " not",
            ),
            (
                "people prefer the videos of KVPO",
                "Fig. 5: 32 participants",
                "the worlds have no people",
            ),
            (
                "quality and semantics of VBench rise, too",
                "Table 1",
                "VBench knows nothing of coloured spots",
            ),
            (
                "the margin over Astrolabe is wider on long videos with several prompts",
                "Section 4.2",
                "the stories have one length",
            ),
            (
                "the replay costs little memory",
                "Appendix F, Fig. 8",
                "memory of a small generator says nothing of a large one",
            ),
        )
    ),
)


def verdict(interval: Sequence[float] | None, sign: int) -> str:
    """The verdict on a difference; the rule is that of the module.

    Args:
      interval: of the difference over seeds, [low, high]; None where it is not known.
      sign: 1 if the paper says that the difference is positive, -1 negative, 0 none.
    """
    if interval is None:
        return UNTESTABLE
    low, high = interval
    if sign == 0:
        return REPRODUCED if -NEGLIGIBLE <= low and high <= NEGLIGIBLE else NOT
    return REPRODUCED if min(sign * low, sign * high) > 0 else NOT


def value(run: Run, measure: str) -> float:
    """The gain of a run in a measure; see `Claim`."""
    if measure == "gain":
        return run["gain"]
    task, _, part = measure.rpartition(": ")
    if not task:
        return run["parts"][part]
    return run["tasks"][task]["after"][part] - run["tasks"][task]["before"][part]


def by_seed(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """Seed -> the finished run of an arm."""
    return {run["seed"]: run for run in runs if run["arm"] == arm and not run.get("fault")}


def judged(runs: Sequence[Run], claim: Claim) -> dict[str, Any]:
    """What evidence.json has of a claim."""
    own, other = by_seed(runs, claim.arm), by_seed(runs, claim.over)
    seeds = sorted(own.keys() & other.keys() if claim.over else own)
    values = [
        value(own[s], claim.measure) - (value(other[s], claim.measure) if claim.over else 0.0)
        for s in seeds
    ]
    ours, interval = mean_interval(np.array(values)) if values else (None, None)
    why = claim.why
    if not why and interval is None:
        arms = " and ".join(repr(name) for name in (claim.arm, claim.over) if name)
        why = f"there are not two seeds of {arms}"
    return {
        "claim": claim.claim,
        "paper": claim.paper,
        "ours": ours,
        "ci95": interval,
        "n_seeds": len(seeds),
        "verdict": verdict(interval, claim.sign),
        "measure": claim.measure,
        "arms": [name for name in (claim.arm, claim.over) if name],
        "claimed": claim.sign,
        "why": why,
    }


# ---------------------------------------------------------------- arms


def of_arm(runs: Sequence[Run], name: str, versus: str) -> dict[str, Any]:
    """The figures of an arm: means over its seeds with their intervals.

    Args:
      runs: of all arms.
      name: the arm.
      versus: the arm that it is compared with.
    """
    own, other = by_seed(runs, name), by_seed(runs, versus)
    failed = {str(r["seed"]): r["fault"] for r in runs if r["arm"] == name and r.get("fault")}
    out: dict[str, Any] = {"arm": name, "seeds": sorted(own), "failed": failed}
    if not own:
        return out

    def over_seeds(values: Sequence[float]) -> dict[str, Any]:
        mean, interval = mean_interval(np.array(values))
        return {"mean": mean, "ci95": interval, "seeds": list(values)}

    first = next(iter(own.values()))
    out["gain"] = over_seeds([run["gain"] for run in own.values()])
    out["before"] = first["before"]
    out["parts"] = {
        part: over_seeds([run["parts"][part] for run in own.values()]) for part in first["parts"]
    }
    out["tasks"] = {
        task: {
            part: over_seeds([value(run, f"{task}: {part}") for run in own.values()])
            for part in found["after"]
        }
        | {"before": found["before"]}
        for task, found in first["tasks"].items()
    }
    for group in ("means", "spent"):
        out[group] = {
            key: float(np.mean([run[group][key] for run in own.values()])) for key in first[group]
        }
    common = sorted(own.keys() & other.keys())
    if name != versus and common:
        pairs = [(own[s], other[s]) for s in common]
        out["over"] = versus
        out["difference"] = over_seeds([a["gain"] - b["gain"] for a, b in pairs])
        if all(run["gains"] is not None for pair in pairs for run in pair):
            per_prompt = np.mean([np.subtract(a["gains"], b["gains"]) for a, b in pairs], axis=0)
            out["difference"]["ci95_prompts"] = mean_interval(per_prompt)[1]
    return out


def summed_up(kept: Mapping[str, Any]) -> dict[str, Any]:
    """evidence.json: what was kept of the runs, with the figures of the arms and the claims."""
    runs, described = kept["runs"], kept["described"]
    arms = [of_arm(runs, name, about["versus"]) for name, about in described.items()]
    return {"claims": [judged(runs, claim) for claim in CLAIMS], "arms": arms, **kept}


# ---------------------------------------------------------------- pages


def search_rows(rows: Sequence[Run]) -> list[dict[str, str]]:
    """The table of a search, a point each, the means over its seeds."""
    out = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        here = [row for row in rows if row["arm"] == name]
        done = [row for row in here if "gain" in row]
        row = {"settings": name, "seeds": f"{len(done)} of {len(here)}"}
        if done:
            row["gain"] = f"{np.mean([r['gain'] for r in done]):+.4f}"
            for task in done[0]["tasks"]:
                for part in ("SC", "VQ", "other"):
                    gained = [value(r, f"{task}: {part}") for r in done]
                    row[f"{task}: {part}"] = f"{np.mean(gained):+.3f}"
            row["iterations"] = f"{np.mean([r['spent']['iterations'] for r in done]):.0f}"
        out.append(row)
    columns = dict.fromkeys(name for row in out for name in row)
    return [{name: row.get(name, "") for name in columns} for row in out]


def write(found: Mapping[str, Any], output: Path) -> None:
    """Writes evidence.json and the pages into a folder."""
    write_json(found, output / "evidence.json")
    with replacing(output / "evidence.md") as temporary:
        temporary.write_text(markdown_page(found), encoding="utf-8")


def markdown_page(found: Mapping[str, Any]) -> str:
    """evidence.md."""
    lines = ["# Evidence", "", "| claim | ours | 95 % | seeds | verdict |", "|---|---|---|---|---|"]
    for c in found["claims"]:
        ours = "-" if c["ours"] is None else f"{c['ours']:+.4f}"
        ci = show_interval(c["ci95"])
        lines.append(f"| {c['claim']} | {ours} | {ci} | {c['n_seeds']} | {c['verdict']} |")
    return "\n".join(lines) + "\n"
