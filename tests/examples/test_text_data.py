"""The text is real, the same every time, goes on for as long as it is asked, and bad files say so."""

import pytest
import torch
from text_data import ByteEncoder, Corpus, FolderEncoder, StandardLibrary, TextError, TextFile, read_corpus


class Words:
    """A source of three short documents."""

    name = "three words"
    cycles = True

    def documents(self):
        """The texts."""
        yield from ("one", "", "two")


def text_of(corpus):
    return bytes(corpus.tokens[corpus.tokens < 256].tolist()).decode()


def test_the_standard_library_has_real_text_and_gives_the_same_again():
    first, again = (
        read_corpus(StandardLibrary(), ByteEncoder(), needed=50_000, length=512) for _ in range(2)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.numel() == 50_000
    assert not first.complete
    assert " statement" in text_of(first)
    assert f"{first.bytes_read:,} bytes of the standard library" in first.describe(50_000)


def test_after_the_topics_come_the_sources():
    topics = 600_000
    corpus = read_corpus(StandardLibrary(), ByteEncoder(), needed=2 * topics, length=512)
    assert "import " in text_of(corpus)
    assert corpus.tokens.numel() == 2 * topics


def test_documents_are_kept_apart_and_a_short_text_starts_again():
    corpus = read_corpus(Words(), ByteEncoder(), needed=100, length=20)
    assert corpus.tokens.tolist() == [*b"one", 256, 256, *b"two", 256]
    assert corpus.complete
    assert corpus.bytes_read == 6
    batch = corpus.batch(1, rows=2, length=5)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[110, 101, 256, 256, 116], [119, 111, 256, 111, 110]]
    assert "gone through 11.1 times" in corpus.describe(100)


def test_batches_follow_one_another():
    numbers = torch.arange(24, dtype=torch.int32)
    corpus = Corpus(tokens=numbers, source="numbers", bytes_read=24, complete=True, starts=torch.tensor([0]))
    rows = torch.cat([corpus.batch(index, rows=2, length=4) for index in range(3)])
    assert rows.flatten().tolist() == list(range(24))


def test_positions_start_anew_with_each_document_and_each_row():
    corpus = read_corpus(Words(), ByteEncoder(), needed=100, length=20)
    assert corpus.starts.tolist() == [0, 4, 5]  # the document between is empty
    assert corpus.positions(0, rows=1, length=9).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3]]
    assert corpus.positions(1, rows=2, length=5).tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 1]]


def test_a_file_is_one_document_whatever_its_size(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("ä" * 1_100_000, encoding="utf-8")  # a chunk boundary falls into a character
    corpus = read_corpus(TextFile(str(path)), ByteEncoder(), needed=2_150_000, length=1000)
    assert corpus.tokens.numel() == 2_150_000
    assert set(corpus.tokens.tolist()) == set("ä".encode())


def test_only_as_much_of_a_file_is_read_as_is_needed(tmp_path):
    path = tmp_path / "broken_later.txt"
    path.write_bytes(b"a" * 3_000_000 + b"\xff")
    assert read_corpus(TextFile(str(path)), ByteEncoder(), needed=1000, length=100).tokens.numel() == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b"short", "has 5 tokens .* one sequence needs 100: .* --seq-len 5"),
        (b"abc\xff\xfe" + b"x" * 200, r"is not UTF-8 text \(near byte 3\)"),
        (b"x" * 200 + b"\xc3", "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_corpus(TextFile(str(path)), ByteEncoder(), needed=1000, length=100)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TextError, match="No such file"):
        TextFile(str(tmp_path / "none.txt"))
    with pytest.raises(TextError, match="is a folder; give a file"):
        TextFile(str(tmp_path))


def test_a_tokenizer_from_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<eos>": 0, "one": 1, "two": 2, "?": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path)

    encoder = FolderEncoder(str(tmp_path))
    assert (encoder.vocabulary, encoder.boundary) == (4, 0)
    assert encoder.encode("two one three").tolist() == [2, 1, 3]
    assert read_corpus(Words(), encoder, needed=100, length=2).tokens.tolist() == [1, 0, 0, 2, 0]


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(TextError, match="no such folder"):
        FolderEncoder(str(tmp_path / "none"))
    with pytest.raises(TextError, match="no tokenizer can be read"):
        FolderEncoder(str(tmp_path))
