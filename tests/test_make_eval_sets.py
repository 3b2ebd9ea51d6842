"""Each adapter on a small download of the true layout, and downloads that are wrong."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from scipy import io as scipy_io

from mofi_jax import make_eval_sets
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.evaluators.sets import captions, catalogue, query_index
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.evaluators.sets.downloads import adapters


def picture(name):
    pixels = np.random.default_rng(sum(name.encode())).integers(0, 256, (9, 12, 3), np.uint8)
    return ops.encode_jpeg(pixels, 90)


def layout(names, **texts):
    """File names to contents: pictures, and texts or bytes."""
    return {name: picture(name) for name in names} | {
        name: text if isinstance(text, bytes) else text.encode() for name, text in texts.items()
    }


def matlab(**values):
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, values)
    return buffer.getvalue()


def as_tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def as_zip(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def made(tmp_path, name, source):
    """The set of a download: its pictures by (class, label), result.json, and its folder."""
    out = tmp_path / f"made_{name}"
    make_eval_sets.main(name, source=str(source), out=str(out))
    pictures = picture_sets.read_set(out / "images.tar")
    labels = {}
    if (out / "classes.jsonl").exists():
        labels = picture_sets.read_classes(out / "classes.jsonl", pictures)
    result = json.loads((out / "result.json").read_text())
    assert result["sha256"]["images.tar"] == pictures.sha256()
    assert result["counts"]["pictures"] == len(pictures)
    assert result["licence"] == catalogue.ORIGINS[name].licence
    return pictures, labels, result, out


def test_every_set_has_an_origin_and_is_listed(capsys):
    assert set(adapters.ADAPTERS) == set(catalogue.ORIGINS)
    make_eval_sets.main("list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(catalogue.ORIGINS)
    with pytest.raises(BadInput, match=r"no data set cars196 in .*\(Cars-196, .*non-commercial"):
        picture_sets.read_set("tfds:cars196:test@nowhere")


def test_gpr1200(tmp_path):
    files = layout(["GPR1200/images/10_b.jpg", "GPR1200/images/9_17841400008460056123456.jpg"])
    put(tmp_path / "d", {"GPR1200.zip": as_zip(files)})
    names = {"9": "Löderups kyrka", "10": "Eldorado"}
    put(tmp_path / "d", {"GPR1200_categoryNumber_to_text.json": json.dumps(names).encode()})
    pictures, labels, *_ = made(tmp_path, "gpr1200", tmp_path / "d")
    assert pictures.names == ("9_17841400008460056123456.jpg", "10_b.jpg")
    assert labels[9].label == "Löderups kyrka"
    assert pictures.read(1) == picture("GPR1200/images/10_b.jpg")


def test_sop(tmp_path):
    root = "Stanford_Online_Products"
    test = "image_id class_id super_class_id path\n1 11319 1 bicycle_final/2519_0.JPG\n"
    test += "2 11320 12 toaster_final/2519_0.JPG\n"
    train = "image_id class_id super_class_id path\n1 1 1 bicycle_final/1110_0.JPG\n"
    names = [f"{root}/{name}_final/2519_0.JPG" for name in ("bicycle", "toaster")]
    files = layout([*names, f"{root}/bicycle_final/1110_0.JPG"])
    files |= {f"{root}/Ebay_test.txt": test.encode(), f"{root}/Ebay_train.txt": train.encode()}
    path = tmp_path / "Stanford_Online_Products.zip"
    path.write_bytes(as_zip(files))
    pictures, _, result, _ = made(tmp_path, "sop", path)
    np.testing.assert_array_equal(pictures.classes, [11319, 11320])
    assert pictures.read(0) == picture(names[0])
    assert result["published"] == {"pictures": 60_502, "queries": 0}


def test_cub(tmp_path):
    names = ["001.Black_footed_Albatross/A_0046_18.jpg", "101.White_Pelican/W_0001_2.jpg"]
    root = "CUB_200_2011"
    files = layout([f"{root}/images/{name}" for name in names])
    files[f"{root}/images.txt"] = f"1 {names[0]}\n2 {names[1]}\n".encode()
    files[f"{root}/image_class_labels.txt"] = b"1 1\n2 101\n"
    files[f"{root}/classes.txt"] = b"1 001.Black_footed_Albatross\n101 101.White_Pelican\n"
    files[f"{root}/parts/parts.txt"] = b"1 back\n"
    path = tmp_path / "CUB_200_2011.tgz"
    path.write_bytes(as_tar(files, "w:gz"))
    pictures, labels, *_ = made(tmp_path, "cub", path)
    np.testing.assert_array_equal(pictures.classes, [101])
    assert labels == {101: picture_sets.Class("", "White Pelican")}
    # The same set where the archive has been unpacked.
    put(tmp_path / "unpacked", files)
    (tmp_path / "two").mkdir()
    unpacked, *_ = made(tmp_path / "two", "cub", tmp_path / "unpacked/CUB_200_2011")
    assert unpacked.sha256() == pictures.sha256()


def test_cars(tmp_path):
    kind = [("relative_im_path", "O"), ("bbox_x1", "O"), ("class", "O"), ("test", "O")]
    rows = np.array(
        [("car_ims/000001.jpg", 1, 1, 0), ("car_ims/016185.jpg", 5, 196, 1)], dtype=kind
    )[None]
    names = np.array([f"Car {i}" for i in range(1, 197)], object)[None]
    annotations = matlab(annotations=rows, class_names=names)
    files = layout(["car_ims/000001.jpg", "car_ims/016185.jpg"])
    put(tmp_path / "d", {"car_ims.tgz": as_tar(files, "w:gz"), "cars_annos.mat": annotations})
    pictures, labels, *_ = made(tmp_path, "cars", tmp_path / "d")
    np.testing.assert_array_equal(pictures.classes, [196])
    assert labels[196].label == "Car 196"


def test_inat18(tmp_path):
    names = [f"train_val2018/Plantae/{number}/0f{number}.jpg" for number in (7477, 12)]
    put(tmp_path / "d", {"train_val2018.tar.gz": as_tar(layout(names), "w:gz")})
    put(tmp_path / "d", {"Inat_dataset_splits/Inaturalist_test_set1.txt": names[0].encode()})
    pictures, *_ = made(tmp_path, "inat18", tmp_path / "d")
    np.testing.assert_array_equal(pictures.classes, [7477])


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_revisited(tmp_path, name):
    """Rows are counted from 1; a list of one number, or of none, is none to Matlab."""
    index = [f"all_souls_{i:06d}" for i in range(4)]
    kind = [(key, "O") for key in ("bbx", "easy", "hard", "junk")]
    box = np.array([[1.5, 2.0, 9.2, 8.0]])
    none = np.zeros((1, 0))
    truth = np.array([(box, np.array([[1, 2]]), np.array([[4]]), none)], dtype=kind)[None]
    names = {"imlist": np.array(index, object)[:, None], "qimlist": np.array(["query_0"], object)}
    files = layout([f"jpg/{stem}.jpg" for stem in (*index, "query_0", "unused")])
    archive = as_tar(files, "w:gz")
    put(tmp_path / "d", {"images.tgz": archive, f"gnd_{name}.mat": matlab(gnd=truth, **names)})
    pictures, _, result, out = made(tmp_path, name, tmp_path / "d")
    assert [result["counts"][key] for key in ("pictures", "classes", "queries")] == [4, 1, 1]
    queries = query_index.read_queries(out / "queries.jsonl", pictures)
    found = {setup: rows[rows >= 0].tolist() for setup, rows in queries.positives.items()}
    assert found == {"easy": [0, 1], "medium": [0, 1, 3], "hard": [3]}
    junk = {setup: rows[rows >= 0].tolist() for setup, rows in queries.junk.items()}
    assert junk == {"easy": [3], "medium": [], "hard": [0, 1]}
    cut = query_index.query_pictures(queries, picture_sets.read_set(out / "queries.tar"))
    assert ops.decode_rgb(cut.read(0)).shape == (6, 7, 3)


def test_gldv2(tmp_path):
    ids = ["a1b2c3d4e5f60718", "b1b2c3d4e5f60718", "c1b2c3d4e5f60718", "d1b2c3d4e5f60718"]
    paths = [f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg" for i in ids]
    solution = f"id,images,Usage\n{ids[2]},{ids[0]} {ids[1]},Public\n{ids[3]},None,Ignored\n"
    files = {
        "index/images_000.tar": as_tar(layout(paths[:2])),
        "test/images_000.tar": as_tar(layout(paths[2:])),
        "index.csv": f"id\n{ids[0]}\n{ids[1]}\n".encode(),
        "retrieval_solution_v2.1.csv": solution.encode(),
    }
    pictures, _, result, out = made(tmp_path, "gldv2", put(tmp_path / "d", files))
    queries = query_index.read_queries(out / "queries.jsonl", pictures)
    assert queries.splits == ("public",)
    assert queries.positives[""].tolist() == [[0, 1]]
    assert result["counts"]["pictures"] == 2


def test_met(tmp_path):
    database = [{"id": 7, "path": "MET/7/0.jpg"}, {"id": 8, "path": "MET/8/0.jpg"}]
    test = [{"path": "test_met/0.jpg", "MET_id": 8}, {"path": "test_noart/0.jpg"}]
    val = [{"path": "val_met/0.jpg", "MET_id": 7}]
    files = layout([f"images/{row['path']}" for row in (*database, *val, *test)])
    tables = {"MET_database": database, "mini_MET_database": [], "valset": val, "testset": test}
    for name, rows in tables.items():
        files[f"ground_truth/{name}.json"] = json.dumps(rows).encode()
    pictures, _, _, out = made(tmp_path, "met", put(tmp_path / "d", files))
    np.testing.assert_array_equal(pictures.classes, [7, 8])
    queries = query_index.read_queries(out / "queries.jsonl", pictures)
    assert queries.classes.tolist() == [[7], [8], [query_index.NO_ROW]]
    assert queries.splits == ("val", "test", "test")
    assert len(query_index.query_pictures(queries, picture_sets.read_set(out / "queries.tar"))) == 3


def test_uned(tmp_path):
    """Class numbers of its parts mean different things; a query may be in the index itself."""
    files = {}
    for part in adapters._UNED:
        rows = {"test": [{"path": f"{part}/q/{i}.jpg", "class_id": 3} for i in range(2)]}
        if part in ("inshop", "met", "gldv2"):
            rows["index"] = [{"path": f"{part}/i/0.jpg", "class_id": 3}]
        if part == "rp2k":
            rows["test"][0]["path"] = "rp2k/all/test/\u8304/0.jpg"
        if part == "gldv2":
            rows["test"][1]["class_id"] = [4, 3]
        for split, entries in rows.items():
            files[f"info_files/{part}/{split}.json"] = json.dumps(entries).encode()
            for row in entries:
                path = row["path"].replace("\u8304", "#U8304")  # as unzip has written it
                files[f"images/{path}"] = picture(path)
    pictures, _, result, out = made(tmp_path, "uned", put(tmp_path / "d", files))
    assert result["counts"]["pictures"] == 5 * 2 + 3
    assert len(np.unique(pictures.classes)) == 8
    queries = query_index.read_queries(out / "queries.jsonl", pictures)
    assert len(queries) == 16
    for i, domain in enumerate(queries.domains):
        junk = [pictures.names[row] for row in queries.junk[""][i] if row >= 0]
        assert junk == ([] if domain in ("inshop", "met", "gldv2") else [queries.names[i]])
    assert (
        len(query_index.query_pictures(queries, picture_sets.read_set(out / "queries.tar"))) == 16
    )


def test_ilias(tmp_path):
    core = "ilias_core"
    names = ["bimp_000/query/Q000_00", "bimp_000/pos/P000_00", "zoot_999/pos/P999_04"]
    files = layout([f"{core}/{name}.jpg" for name in names])
    files[f"{core}/bimp_000/query/Q000_00_bbox.txt"] = b"1 2 3 4"
    files[f"{core}/bimp_000/query/T000.txt"] = b"a bold bimp\n"
    shards = {"ilias_core.tar": as_tar(files), "yfcc100m/0000.tar": as_tar(layout(["17/0a.jpg"]))}
    pictures, _, _, out = made(tmp_path, "ilias", put(tmp_path / "d", shards))
    assert pictures.classes.tolist() == [0, 999, 1000]
    for file, name in (("queries", "0_Q000_00.jpg"), ("text_queries", "a bold bimp")):
        queries = query_index.read_queries(out / f"{file}.jsonl", pictures)
        assert queries.names == (name,)
        assert queries.classes.tolist() == [[0]]


def test_inquire(tmp_path):
    names = ["train/00001_Animalia/a.jpg", "train/00002_Plantae/b.jpg"]
    table = ",query_id,query_text,supercategory,category,iconic_group\n"
    files = {
        "train.tar.gz": as_tar(layout(names), "w:gz"),
        "inquire/inquire_queries_val.csv": f"{table}0,3,Tagged swan,A,B,Birds\n".encode(),
        "inquire/inquire_queries_test.csv": f'{table}1,4,"a ""la gruta"" frog",A,B,C\n'.encode(),
        "inquire/inquire_annotations.csv": f"query_id,image_path\n4,{names[1]}\n".encode(),
    }
    pictures, _, _, out = made(tmp_path, "inquire", put(tmp_path / "d", files))
    queries = query_index.read_queries(out / "text_queries.jsonl", pictures)
    assert queries.names == ("Tagged swan", 'a "la gruta" frog')
    assert queries.splits == ("val", "test")
    assert queries.positives[""].tolist() == [[query_index.NO_ROW], [1]]


@pytest.mark.parametrize("name", ["coco_karpathy", "flickr30k"])
def test_karpathy(tmp_path, name):
    coco = name == "coco_karpathy"
    rows = []
    for i, split in enumerate(("test", "train", "test")):
        file = f"COCO_val2014_{i:012d}.jpg" if coco else f"10000{i}.jpg"
        sentences = [{"raw": f"A dog {k}. ", "tokens": ["a", "dog"]} for k in range(5 + i)]
        row = {"filename": file, "split": split, "sentences": sentences, "imgid": i}
        rows.append({**row, "filepath": "val2014"} if coco else row)
    folder = "val2014" if coco else "flickr30k-images"
    archive = as_zip(layout([f"{folder}/{row['filename']}" for row in rows]))
    truth = json.dumps({"images": rows, "dataset": name.partition("_")[0]}).encode()
    files = {"images.zip": archive, f"dataset_{name.partition('_')[0]}.json": truth}
    pictures, _, result, out = made(tmp_path, name, put(tmp_path / "d", files))
    assert result["counts"]["captions"] == 12
    found = captions.read_captions(out / "captions.jsonl", pictures)
    assert len(found.texts) == 10  # the first five of each
    assert found.texts[0] == "A dog 0. "


def devkit():
    kind = [(key, "O") for key in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    rows = [
        (1, "n02119789", "kit fox, Vulpes macrotis", 0),
        (2, "n01440764", "tench, Tinca tinca", 0),
        (1001, "n00001740", "entity", 2),
    ]
    root = "ILSVRC2012_devkit_t12/data"
    return {
        f"{root}/meta.mat": matlab(synsets=np.array(rows, dtype=kind)[:, None]),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n1\n",
    }


def test_imagenet(tmp_path):
    """IDs of the devkit are not the numbers that the world knows the classes by."""
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]
    files = {"ILSVRC2012_img_val.tar": as_tar(layout(names))}
    files["ILSVRC2012_devkit_t12.tar.gz"] = as_tar(devkit(), "w:gz")
    inner = {
        f"{wnid}.tar": as_tar(layout([f"{wnid}_10.JPEG"])) for wnid in ("n01440764", "n02119789")
    }
    train = {"ILSVRC2012_img_train.tar": as_tar(inner)}
    train["ILSVRC2012_devkit_t12.tar.gz"] = files["ILSVRC2012_devkit_t12.tar.gz"]
    pictures, labels, *_ = made(tmp_path, "imagenet", put(tmp_path / "val", files))
    assert [pictures.read(i) for i in range(3)] == [picture(names[i]) for i in (1, 0, 2)]
    np.testing.assert_array_equal(pictures.classes, [0, 1, 1])
    assert labels[1] == picture_sets.Class("n02119789", "kit fox")
    pictures, *_ = made(tmp_path, "imagenet_train", put(tmp_path / "train", train))
    assert pictures.names == ("0_n01440764_10.JPEG", "1_n02119789_10.JPEG")


def test_cifar100(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    rows = b"".join(
        bytes([4, fine]) + image.transpose(2, 0, 1).tobytes()
        for fine, image in zip((1, 0), pixels, strict=True)
    )
    root = "cifar-100-binary"
    files = {f"{root}/test.bin": rows, f"{root}/train.bin": rows[:3074]}
    files[f"{root}/fine_label_names.txt"] = b"apple\naquarium_fish\n\n"
    path = tmp_path / "cifar-100-binary.tar.gz"
    path.write_bytes(as_tar(files, "w:gz"))
    pictures, labels, *_ = made(tmp_path, "cifar100", path)
    assert labels[1].label == "aquarium fish"
    assert pictures.names == ("0_00001.png", "1_00000.png")
    np.testing.assert_array_equal(ops.decode_rgb(pictures.read(1)), pixels[0])
    assert len(made(tmp_path, "cifar100_train", path)[0]) == 1


# ---------------------------------------------------------------------------------- what is wrong


def test_a_broken_picture_stays_and_is_named(tmp_path):
    files = layout(["images/1_a.jpg", "images/1_b.jpg"])
    files["images/1_b.jpg"] = files["images/1_b.jpg"][:200]
    pictures, _, result, _ = made(tmp_path, "gpr1200", put(tmp_path / "d", files))
    assert result["broken"] == ["1_b.jpg"]
    assert len(pictures) == 2


def test_downloads_that_cannot_be_used(tmp_path):
    names = ["train_val2018/Plantae/7/a.jpg", "train_val2018/Plantae/7/b.jpg"]
    split = "Inat_dataset_splits/Inaturalist_test_set1.txt"
    folder = put(tmp_path / "d", {**layout(names[:1]), split: "\n".join(names).encode()})
    wrong = {
        "no set that can be read: choose one of gpr1200": ("laion", folder),
        r"d has no train_val2018/Plantae/7/b.jpg: download it too": ("inat18", folder),
        r"There is no --source=.*nowhere; GPR1200: visual-.*download it first": (
            *("gpr1200", tmp_path / "nowhere"),
        ),
        "d holds no pictures of gpr1200, which is": ("gpr1200", folder),
    }
    for sentence, (name, source) in wrong.items():
        with pytest.raises(BadInput, match=sentence):
            make_eval_sets.main(name, source=str(source), out=str(tmp_path / "out"))
    (folder / split).write_text("7\n")
    with pytest.raises(BadInput, match=r"not laid out as published \(IndexError.*Smooth-AP"):
        make_eval_sets.main("inat18", source=str(folder), out=str(tmp_path / "out"))
    put(folder, {"more.zip": as_zip(layout(names))[:50]})
    with pytest.raises(BadInput, match=r"or an archive in it cannot be read"):
        make_eval_sets.main("inat18", source=str(folder), out=str(tmp_path / "out"))
    # A picture whose bytes are not those that were packed, or that a password hides.
    data = bytearray(as_zip(layout(["images/1_a.jpg"])))
    for place, told in ((100, "Bad CRC-32"), (6, "is encrypted")):
        broken = data.copy()
        broken[place] ^= 1
        if place == 6:
            broken[broken.index(b"PK\x01\x02") + 8] ^= 1
        (tmp_path / "broken.zip").write_bytes(broken)
        with pytest.raises(BadInput, match=rf"broken.zip or an archive in it .*{told}.*: unpack"):
            make_eval_sets.main(
                "gpr1200", source=str(tmp_path / "broken.zip"), out=str(tmp_path / "out")
            )
    with pytest.raises(BadInput, match=r"--source and --out are needed; the set is iNaturalist"):
        make_eval_sets.main("inat18")
    with pytest.raises(BadInput, match=r"is there already"):
        make_eval_sets.main("inat18", source=str(folder), out=str(folder))
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
