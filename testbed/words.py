"""The words that charts are made of: themes with their labels, colours, and small helpers of English."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Labels of one sort. `measures` are what may be counted of them, with the unit in brackets if there is one."""

    noun: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    ordered: bool = False  # the labels follow each other in time


_PLACE = ("Visitors", "Rainy days", "Schools", "Parks", "New homes", "Hotels", "Trips", "Snow (cm)")
_GOODS = ("Price", "Orders", "Stock", "Boxes sold", "Exports", "Profit", "Returns", "Sales (kg)")
_LIFE = ("Weight (kg)", "Speed (km/h)", "Number seen", "Age", "Length (cm)", "Votes")
_WOOD = ("Height (m)", "Age", "Number planted", "Planks sold", "Number felled")
_TIME = ("Rain (mm)", "Visitors", "Sales", "Calls", "Births", "Sunny hours", "Parcels", "Heat (kWh)", "New users")
_WORK = ("Staff", "Budget", "Tickets", "Meetings", "Costs", "Hours worked", "Laptops")
_RIDE = ("Rides", "Trips", "Delays", "Noise (dB)", "Fares", "Seats")
_PLAY = ("Players", "Clubs", "Medals", "Fans", "Injuries", "Teams", "Votes")


def _theme(noun: str, labels: str, measures: tuple[str, ...], ordered: bool = False) -> Theme:
    return Theme(noun, tuple(labels.split()), measures, ordered)


THEMES = (
    _theme("month", "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec", _TIME, True),
    _theme("day", "Mon Tue Wed Thu Fri Sat Sun", _TIME, True),
    _theme(
        "city", "Oslo Rome Paris Lima Cairo Delhi Tokyo Milan Seoul Quito Bonn Bern Leeds York Kyiv Riga Doha", _PLACE
    ),
    _theme(
        "country", "Peru Chile Kenya India China Japan Spain Italy Egypt Ghana Nepal Cuba Mali Oman Fiji Chad", _PLACE
    ),
    _theme("fruit", "Apple Pear Plum Fig Kiwi Mango Lemon Lime Grape Peach Melon Cherry Banana", _GOODS),
    _theme("animal", "Cat Dog Fox Owl Bear Wolf Deer Goat Horse Sheep Duck Frog Tiger Lion Mouse Seal", _LIFE),
    _theme("crop", "Leek Kale Corn Rice Rye Wheat Onion Carrot Potato Garlic Soy", _GOODS),
    _theme("team", "Legal HR IT Design Finance Support Sales Travel Press Audit", _WORK),
    _theme("sport", "Golf Judo Polo Chess Rugby Tennis Hockey Rowing Boxing Darts Surf", _PLAY),
    _theme("tool", "Saw Drill Nail Hammer Rope Ladder Axe Spade Clamp Chisel", _GOODS),
    _theme("drink", "Tea Coffee Milk Juice Water Cola Cocoa Soda Cider", _GOODS),
    _theme("tree", "Oak Elm Ash Pine Fir Birch Maple Cedar Willow", _WOOD),
    _theme("metal", "Iron Gold Tin Zinc Copper Silver Nickel Steel", _GOODS),
    _theme("room", "Hall Kitchen Attic Cellar Studio Porch Office Garage", _WORK),
    _theme("vehicle", "Bus Tram Train Car Bike Ferry Plane Taxi Metro Truck Van", _RIDE),
    _theme("instrument", "Piano Flute Harp Drum Viola Cello Oboe Tuba Guitar", _PLAY),
)

PAIRS = (
    ("Plan", "Real"),
    ("Town", "Village"),
    ("North", "South"),
    ("Import", "Export"),
    ("Early", "Late"),
    ("Old", "New"),
    ("Home", "Away"),
    ("Summer", "Winter"),
)
COLUMNS = ("Size", "Cost", "Age", "Stock", "Score", "Goals", "Hours", "Units", "Rate", "Loss")

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "blue": (58, 120, 230),
    "green": (44, 160, 60),
    "orange": (245, 135, 20),
    "purple": (145, 70, 190),
    "teal": (20, 165, 165),
    "pink": (240, 120, 180),
    "brown": (145, 90, 50),
    "yellow": (240, 205, 40),
    "grey": (140, 140, 145),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "cream": (253, 246, 222),
    "pale grey": (228, 230, 232),
    "navy": (16, 24, 60),
    "black": (12, 12, 12),
}
DARK = ("navy", "black")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def ink(paper: RGB) -> RGB:
    """White or black, whichever is easier to read on `paper`."""
    red, green, blue = paper
    return (255, 255, 255) if 0.3 * red + 0.59 * green + 0.11 * blue < 135 else (0, 0, 0)


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(number: int, noun: str) -> str:
    """`one bar`, `two bars`."""
    return f"{NUMBERS[number]} {noun}{'' if number == 1 else 's'}"


SHAPES = ("circle", "square", "triangle", "diamond", "star")
SIZES = ("small", "medium", "large")
MARKS = (*"123456789", *"ABCDEFGHJKLM")
SCENE = frozenset((*SHAPES, *SIZES, *COLOURS, *MARKS))  # the words that tell one shape of a scene from another
