"""The decision of `selection` for one picture, as its docstring words it."""

import math


def shares(candidates, evidence, config):
    """Of candidates (mention, entity, prior) p(entity | its mention means something), and that."""
    found = []
    for mention, entity, _ in candidates:
        own = [c for c in candidates if c[0] == mention]
        weights = {
            e: prior ** config["prior_weight"] * math.exp(config["kin_weight"] * evidence[e][0])
            for _, e, prior in own
        }
        fits = {e: weight / sum(weights.values()) * evidence[e][2] for e, weight in weights.items()}
        means = min(1, sum(prior for _, _, prior in own))
        known = means * sum(fits.values())
        found.append((fits[entity] / sum(fits.values()), known / (known + 1 - means)))
    return found


def choose(candidates, evidence, config):
    """Labels of one picture: [(entity, probability)], best first; or none, and the reason.

    Args:
      candidates: (mention, entity, prior).
      evidence: (kin, shown, fit) by entity; shown is 0 for what is no label.
    """
    if not candidates:
        return [], "no_candidate"
    share = shares(candidates, evidence, config)
    best = {}
    for (mention, entity, _), (own, means) in zip(candidates, share, strict=True):
        shown = evidence[entity][1]
        if shown > 0:
            this = ((round(own * shown, 9), -entity), own, means, entity)
            best[mention] = max(best.get(mention, this), this)
    if not best:
        return [], "barred"
    # Of an entity that several mentions mean, the one that means it most.
    found = {}
    for _, own, means, entity in best.values():
        shown = min(max(evidence[entity][1] * means, 1e-6), 1 - 1e-6)
        found[entity] = max(
            found.get(entity, (-1,)), (round(own * means, 9), own, shown / (1 - shown))
        )
    total = 1 + sum(odds for *_, odds in found.values())
    probable = {entity: round(own * odds / total, 4) for entity, (_, own, odds) in found.items()}
    ranked = sorted(probable.items(), key=lambda item: (-item[1], item[0]))
    kept = [item for item in ranked[: config["max_labels"]] if item[1] >= config["min_probability"]]
    return kept, None if kept else "below_min_probability"


def choose_by_text(candidates):
    """The likeliest entity of each mention that is as likely as nothing, each once."""
    chosen = {}
    for mention in sorted({mention for mention, _, _ in candidates}):
        own = [c for c in candidates if c[0] == mention]
        _, entity, prior = min(own, key=lambda c: (-c[2], c[1]))
        if prior >= 1 - sum(c[2] for c in own):
            chosen[entity] = None
    return list(chosen)
