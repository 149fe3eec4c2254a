"""What is known about each data set without its files, and the normalisation constants in use."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)

NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # name -> mean, std on the [0, 1] scale
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),  # WMDD and RDED use it for every set; Tiny-ImageNet in DC-type methods
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),  # SRe2L, CDA, DWA
    "cifar10": (CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),  # DC, DSA, DM, MTT; SRe2L for CIFAR-100
    "cifar10-exact": (CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),  # the true pixel deviation; SRe2L++
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),  # DC, DSA, DM
    "cifar100-edc": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # DWA for CIFAR-100, EDC for both CIFAR sets
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),  # DC, DSA, DM
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),  # DC, DSA, DM
    "fashion-mnist": ((0.2861,) * 3, (0.3530,) * 3),  # DC, DSA, DM
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}

FETCH = "or call common.datasets.load(..., download=True)"  # by torchvision


@dataclass(frozen=True)
class DataInfo:
    """A data set as published.

    counts: (train, test) images of each edition. size: native side in px, None where it varies. note: what a reader
    of a result must know. source: how to get the files. streamed: never loaded into memory. folders: the class folders,
    where few enough to list. mean, std: default normalisation on the [0, 1] scale.
    """

    classes: int
    counts: dict[str, tuple[int, int]]
    size: int | None
    channels: int
    note: str
    source: str
    streamed: bool = False
    folders: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


INFO: dict[str, DataInfo] = {
    "digits": DataInfo(
        classes=10,
        counts={"embedded": (1_437, 360)},
        size=32,
        channels=1,
        note="8x8 scans embedded in scikit-learn, resized to 32x32; fixed split with 36 test images per class",
        source="pip install scikit-learn",
    ),
    "cifar10": DataInfo(
        classes=10,
        counts={"published": (50_000, 10_000)},
        size=32,
        channels=3,
        note="Krizhevsky 2009",
        source=f"unpack cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html) there, {FETCH}",
    ),
    "cifar100": DataInfo(
        classes=100,
        counts={"published": (50_000, 10_000)},
        size=32,
        channels=3,
        note="Krizhevsky 2009, fine labels",
        source=f"unpack cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html) there, {FETCH}",
    ),
    "svhn": DataInfo(
        classes=10,
        counts={"published": (73_257, 26_032)},
        size=32,
        channels=3,
        note="Netzer 2011, train and test parts without the extra part",
        source=f"put {{train,test}}_32x32.mat (ufldl.stanford.edu/housenumbers) there, {FETCH}",
    ),
    "mnist": DataInfo(
        classes=10,
        counts={"published": (60_000, 10_000)},
        size=28,
        channels=1,
        note="LeCun 1998",
        source="write the images as mnist/{train,test}/<class>/<image>.png there (yann.lecun.com/exdb/mnist)",
    ),
    "fashion-mnist": DataInfo(
        classes=10,
        counts={"published": (60_000, 10_000)},
        size=28,
        channels=1,
        note="Xiao 2017",
        source="write the images as fashion-mnist/{train,test}/<class>/<image>.png there "
        "(github.com/zalandoresearch/fashion-mnist)",
    ),
    "tiny-imagenet": DataInfo(
        classes=200,
        counts={"published": (100_000, 10_000)},
        size=64,
        channels=3,
        note="the val part serves as test; classes in ascending WordNet order, which is not the order of wnids.txt",
        source="unpack tiny-imagenet-200.zip (cs231n.stanford.edu/tiny-imagenet-200.zip) there",
    ),
    "imagenette": DataInfo(
        classes=10,
        counts={"v2": (9_469, 3_925), "v1, the ILSVRC split": (12_894, 500)},
        size=None,
        channels=3,
        note="fast.ai's split, in editions of 160 px, 320 px and the original size; papers crop 224 px from originals, "
        "and some test on the 500 ILSVRC val images: name size and split beside a result",
        source="unpack imagenette2.tgz, or its 320 or 160 px edition, there (github.com/fastai/imagenette)",
        folders=(
            "n01440764",
            "n02102040",
            "n02979186",
            "n03000684",
            "n03028079",
            "n03394916",
            "n03417042",
            "n03425413",
            "n03445777",
            "n03888257",
        ),
    ),
    "imagewoof": DataInfo(
        classes=10,
        counts={"v2": (9_025, 3_929), "v1, the ILSVRC split": (12_454, 500)},
        size=None,
        channels=3,
        note="ten dog breeds, fast.ai's split, in editions of 160 px, 320 px and the original size",
        source="unpack imagewoof2.tgz, or its 320 or 160 px edition, there (github.com/fastai/imagenette)",
        folders=(
            "n02086240",
            "n02087394",
            "n02088364",
            "n02089973",
            "n02093754",
            "n02096294",
            "n02099601",
            "n02105641",
            "n02111889",
            "n02115641",
        ),
    ),
    "imagenet-1k": DataInfo(
        classes=1000,
        counts={"ILSVRC2012": (1_281_167, 50_000)},
        size=None,
        channels=3,
        note="the val part serves as test",
        source="get ILSVRC2012 from image-net.org and put train/<class>/<image> and val/<class>/<image> there",
        streamed=True,
    ),
    "imagenet-21k": DataInfo(
        classes=10_450,
        counts={"21K-P, winter 2021": (11_060_223, 522_500)},
        size=None,
        channels=3,
        note="the processed edition with 10,450 classes; the val part serves as test",
        source="get imagenet21k_resized (github.com/Alibaba-MIIL/ImageNet21K) and unpack it there",
        streamed=True,
    ),
}
