"""The data of evaluation comes from two packages that only developers install."""

import pytest

from evaluation.samples import DataMissing, package_folder


@pytest.fixture(scope="session", autouse=True)
def data() -> None:
    try:
        package_folder("easy_vqa", "easy-vqa==1.0")
        package_folder("trdg", "--no-deps trdg==1.8.0")
    except DataMissing as missing:
        pytest.skip(str(missing))
