"""Warehouses that can be published, and servers to publish to: an S3 one, and one of plain files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import read_manifest, write_manifest
from moewh.warehouse.runs import delete_run
from tests.support.hub import REPO, Store, hub
from tests.support.serving import serving
from tests.support.synthetic import random_warehouse

BUCKET = "bucket"
HUB = f"hf://datasets/{REPO}"


RUNS = ("007", "step-20", "step-30")


def publishable(root: Path) -> Layout:
    """A warehouse of three random runs that `moewh verify` finds sound: a geometry has its manifest.

    The first has a geometry; the others are checkpoints of one series, the first of them with raw logits.
    """
    layout, runs = random_warehouse(root)
    for run in runs:
        if run.run_id not in RUNS:
            delete_run(layout, run.run_id)
    for folder in layout.geometry("x").parent.glob("run_id=[!~]*"):
        identity = read_manifest(layout.root / "runs" / folder.name).identity
        write_manifest(folder, identity, None)
    return layout


@contextmanager
def s3() -> Iterator[str]:
    """Serve an object store with one bucket, and have every client of this process use it; yields the bucket's URL."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": f"http://{host}:{port}",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()


def stored() -> dict[str, str]:
    """Return the digest of every file in the bucket of `s3`, by its key, without a request."""
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys
    return {name: key.etag for name, key in list(keys.items())}


@contextmanager
def web(folder: Path) -> Iterator[str]:
    """Serve a folder as plain files, which knows no ranges and lists nothing that moewh reads; yields its URL."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with serving(handler) as address:
        yield address


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def on_the_hub(store: Store) -> Iterator[str]:
    """Have the Hub's client of this process talk to a stand-in; yields the data set's URL."""
    from huggingface_hub import constants

    with hub(store) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_token")
        yield HUB


def shell_rows(database: str | Path, sql: str, *before: str) -> list[tuple[Any, ...]]:
    """Attach a published file as a plain shell does, as `wh`, and return the rows of SQL."""
    with duckdb.connect() as connection:
        for statement in before:
            connection.execute(statement)
        connection.execute(f"attach '{database}' as wh (read_only)")
        return connection.execute(sql).fetchall()
