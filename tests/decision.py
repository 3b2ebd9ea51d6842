"""The decision of `selection` for one picture, as its docstring words it."""

import math


def z_scores(evidence, config):
    """Of evidence (score, text z-score, picture z-score, coherence) by entity."""
    weight = config["prototype_weight"]
    return {
        entity: round(
            (text + weight * picture) / (1 + weight) + config["coherence_weight"] * coherence, 4
        )
        for entity, (_, text, picture, coherence) in evidence.items()
    }


def choose(candidates, evidence, config):
    """Entities, best first, of candidates (mention, entity, prior); or none, and the reason."""
    if not candidates:
        return [], "no_candidate"
    found = z_scores(evidence, config)
    likely = [c for c in candidates if evidence[c[1]][0] >= config["min_score"]]
    if not likely:
        return [], "below_min_score"
    chosen = set()
    for mention in {mention for mention, _, _ in likely}:
        _, negated = max(
            (found[entity] + config["prior_weight"] * math.log(prior), -entity)
            for of, entity, prior in likely
            if of == mention
        )
        if found[-negated] >= config["min_z_score"]:
            chosen.add(-negated)
    ranked = sorted(chosen, key=lambda entity: (-found[entity], entity))[: config["max_labels"]]
    kept = [e for e in ranked if -found[e] <= -found[ranked[0]] + config["max_gap"]]
    return kept, None if kept else "below_min_z_score"


def choose_by_text(candidates):
    """The likeliest entity of each mention that is likelier than nothing, each once."""
    chosen = {}
    for mention in sorted({mention for mention, _, _ in candidates}):
        own = [c for c in candidates if c[0] == mention]
        _, entity, prior = min(own, key=lambda c: (-c[2], c[1]))
        if prior > 1 - sum(c[2] for c in own):
            chosen[entity] = None
    return list(chosen)
