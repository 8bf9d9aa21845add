"""Domains of a stage: which prepared set each draws on, and by which rule."""

from __future__ import annotations

from conf.schema import DomainRule, ReadConfig, StageDataConfig, SyntheticConfig


def rule_of(data: StageDataConfig, domain: str) -> DomainRule:
    """The domain's rule, or the default one."""
    return data.rules.get(domain, DomainRule())


def set_of(data: StageDataConfig, domain: str) -> str:
    """Key in `data.sets` of the set that `domain` draws on. Several domains may share one."""
    return rule_of(data, domain).set or domain


def trained_whole(source: str, read: ReadConfig, synthetic: SyntheticConfig) -> bool:
    """Whether parts of a source's documents are no targets: a cut could then leave half an answer to learn."""
    answers = source == "synthetic" and synthetic.loss == "answer"
    return answers or read.kind == "chat" or (read.kind == "tokens" and bool(read.weight))
