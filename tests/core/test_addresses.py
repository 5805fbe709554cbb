"""What is shown and stored of an address."""

import time

import pytest

from xclip_jax.core.addresses import public


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host.org/a.tar?X-Sig=s&b=c", "https://host.org/a.tar"),
        ("https://token@host/a#part", "https://host/a"),
        ("tar:https://u:p@h/{000..999}.tar?sig=s,https://u:p@g/b.tar?sig=t", "tar:https://h/{000..999}.tar,https://g/b.tar"),
        ("('tar:https://h/a?s=1', \"folder:/b\")", "('tar:https://h/a', \"folder:/b\")"),
        ('{"a": "https://h/a?s=1", "b": 2}', '{"a": "https://h/a", "b": 2}'),
        (r'{"a": "[\"https://u:p@h/a?s=1\"]"}', r'{"a": "[\"https://h/a\"]"}'),
        ("Read https://h/a?s=1. Then (https://h/b?s=it's-a, b).", "Read https://h/a. Then (https://h/b, b)."),
        ("[x](https://h/a?b=c)", "[x](https://h/a)"),
        ("tar:https://h/a?s=1: one is bad", "tar:https://h/a: one is bad"),
        ("simplecache::HTTPS://u:p@h/a?s=1", "simplecache::HTTPS://h/a"),
        ("https://u:p@p:x@h:80/a", "https://h:80/a"),
        ("s3://key:secret@bucket/a?X-Sig=s", "s3://bucket/a"),
        ("gs://bucket/a-??.tar", "gs://bucket/a-??.tar"),
        ("abfs://box@account.host/a/*.tar", "abfs://box@account.host/a/*.tar"),
        ("https://h/team/model@v1/a.tar", "https://h/team/model@v1/a.tar"),
        ("retrieval/csv:https://u:p@h/a.csv?sig=s?image=a&text=b", "retrieval/csv:https://h/a.csv?image=a&text=b"),
        ("retrieval/csv:https://h/a.csv?text=b&sig=s", "retrieval/csv:https://h/a.csv"),
        ("hf:org/name/train?image=a", "hf:org/name/train?image=a"),
        ("me@host.org asks: why?", "me@host.org asks: why?"),
        ("Have you seen http://example.com? It is good.", "Have you seen http://example.com? It is good."),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets(text, shown):
    assert public(text) == shown
    assert public(shown) == shown


@pytest.mark.parametrize(
    "text", ["http://" + "a" * 50_000, "http://" * 8_000, "http://x?" + "." * 50_000, "a" * 50_000 + "://"]
)
def test_a_long_text_takes_no_long_time(text):
    """Captions of others are shown so too; a quadratic form took 20 to 70 s."""
    began = time.process_time()
    public(text)
    assert time.process_time() - began < 8


def test_all_texts_of_json_are_shown_so():
    secret = "https://u:p@h/a?s=1"
    content = {secret: [secret, (secret, 1, None)], "n": {"b": secret}}
    assert public(content) == {"https://h/a": ["https://h/a", ("https://h/a", 1, None)], "n": {"b": "https://h/a"}}
