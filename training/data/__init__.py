"""Data sets by name: a table of kinds, each a class behind one small interface.

``digits`` is scikit-learn's hand-written digits, the embedded data set; ``glyphs`` are characters of many fonts,
drawn here. ``imagefolder:PATH`` has ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``, ``images:PATH`` any tree of
images without labels, ``wds:PATH`` webdataset shards ``PATH/train*.tar`` and ``PATH/val*.tar`` of a folder or URL,
``hfds:NAME`` a data set of Hugging Face's ``datasets``; these use timm's transforms. ``python:MODULE:FUNCTION`` is
what a function of one's own returns. ``pydocs`` and ``wikitext:PATH`` are texts. All are read by index, so that any
number of workers sees every image once, in an order that a seed gives.
"""

from .base import NO_LABEL, UNREADABLE, Batch, ClassOrder, Data, DataInfo, OpenOptions, images_only
from .classes import read_names
from .content import content_changes, content_of
from .digits import Digits
from .folder import ImageFolder
from .glyphs import Glyphs
from .huggingface import HuggingFace
from .own import OwnData, own_data
from .registry import KINDS, absolute_name, check_data_name, open_data, open_text, register
from .shards import Shards
from .text import TextData, check_words
from .unlabelled import UnlabelledImages

__all__ = [
    "KINDS",
    "NO_LABEL",
    "UNREADABLE",
    "Batch",
    "ClassOrder",
    "Data",
    "DataInfo",
    "Digits",
    "Glyphs",
    "HuggingFace",
    "ImageFolder",
    "OpenOptions",
    "OwnData",
    "Shards",
    "TextData",
    "UnlabelledImages",
    "absolute_name",
    "check_data_name",
    "check_words",
    "content_changes",
    "content_of",
    "images_only",
    "open_data",
    "open_text",
    "own_data",
    "read_names",
    "register",
]
