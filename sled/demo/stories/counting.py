"""Stories of sharing and counting."""

PARTS = {2: "Half", 3: "A third", 4: "A quarter", 5: "A fifth"}


def sharing(t):
    each, kids = t.number(2, 35), t.number(2, 12)
    t.step("Each", each * kids, "/", kids)
    total, things = each * kids, t.things
    return t.pick(f"{t.name} shares {total} {things} equally among {kids} friends. How many does each get?",
                  f"{total} {things} go into {kids} bags, the same in each. How many are in a bag?")


def sharing_the_rest(t):
    each, kids, kept = t.number(2, 35), t.number(2, 10), t.number(2, 25)
    total = each * kids + kept
    rest = t.step("Rest", total, "-", kept)
    t.step("Each", rest, "/", kids)
    return (f"{t.name} has {total} {t.things}, keeps {kept} and shares the rest among {kids} friends. "
            "How many does each friend get?")


def boxes(t):
    count, size, loose = t.number(2, 20), t.number(2, 25), t.number(2, 35)
    packed = t.step("Packed", count, "*", size)
    t.step("All", packed, "+", loose)
    return f"{t.name} has {count} boxes with {size} {t.things} each, and {loose} loose ones. How many in all?"


def times_as_many(t):
    n, factor = t.number(2, 45), t.number(2, 7)
    a, b = t.two_names
    second = t.step(b, n, "*", factor)
    things = t.things
    if t.number(0, 1):
        t.step("Both", n, "+", second)
        return f"{a} has {n} {things}. {b} has {factor} times as many. How many do they have together?"
    t.step("More", second, "-", n)
    return f"{a} has {n} {things}, {b} {factor} times as many. How many more does {b} have?"


def fewer(t):
    n, less = t.number(14, 190), t.number(2, 75)
    a, b = t.two_names
    second = t.step(b, n, "-", less)
    t.step("Both", n, "+", second)
    things = t.things
    return f"{a} has {n} {things}. {b} has {less} fewer. How many do they have together?"


def found_and_lost(t):
    n, found, lost = t.number(10, 190), t.number(2, 75), t.number(2, 75)
    more = t.step("Then", n, "+", found)
    t.step("Left", more, "-", lost)
    return t.pick(f"{t.name} has {n} {t.things}, finds {found} and loses {lost}. How many are left?",
                  f"A shop has {n} {t.things}, gets {found} more and sells {lost}. How many are there now?")


def bus(t):
    n, off, on = t.number(14, 140), t.number(2, 45), t.number(2, 45)
    left = t.step("Stay", n, "-", off)
    t.step("Now", left, "+", on)
    ride = t.pick("bus", "train", "boat", "tram")
    return f"{n} people are on a {ride}. {off} get off and {on} get on. How many are on it now?"


def part_of_a_class(t):
    part, size = t.number(2, 5), t.number(2, 45)
    n = part * size
    away = t.step("Part", n, "/", part)
    group, act = t.pick("class", "club", "team", "group"), t.pick("sing", "swim", "dance", "read")
    if t.number(0, 1):
        t.step("Rest", n, "-", away)
        return f"{PARTS[part]} of a {group} of {n} {act}. How many do not?"
    return f"{PARTS[part]} of a {group} of {n} {act}. How many is that?"


def chairs(t):
    rows, seats, empty = t.number(3, 25), t.number(4, 25), t.number(2, 35)
    total = t.step("Seats", rows, "*", seats)
    t.step("Taken", total, "-", empty)
    room = t.pick("hall", "cinema", "theatre", "tent")
    return f"A {room} has {rows} rows of {seats} seats. {empty} seats are empty. How many are taken?"


def legs(t):
    birds, beasts = t.number(2, 45), t.number(2, 45)
    two, four = t.pick("hens", "ducks", "geese"), t.pick("cows", "goats", "sheep", "dogs")
    first = t.step(two.capitalize(), birds, "*", 2)
    second = t.step(four.capitalize(), beasts, "*", 4)
    t.step("Legs", first, "+", second)
    return f"On a farm are {birds} {two} and {beasts} {four}. How many legs do they have in all?"


def average(t):
    a, b, c = t.number(2, 55), t.number(2, 55), t.number(2, 55)
    t.need((a + b + c) % 3 == 0)
    two = t.step("Two", a, "+", b)
    total = t.step("All", two, "+", c)
    t.step("Average", total, "/", 3)
    what = t.pick("points", "goals", "fish", "pages")
    return f"{t.name} has {a}, {b} and {c} {what} on three days. What is the average?"


def cuts(t):
    length, pieces = t.number(2, 17), t.number(3, 25)
    t.step("Pieces", length * pieces, "/", length)
    t.step("Cuts", pieces, "-", 1)
    what = t.pick("rope", "log", "ribbon", "board")
    return f"A {what} of {length * pieces} m is cut into pieces of {length} m. How many cuts does it take?"


def score(t):
    wins, draws, per = t.number(2, 25), t.number(2, 25), t.number(2, 5)
    points = t.step("Wins", wins, "*", per)
    t.step("Points", points, "+", draws)
    return (f"A win gives {per} points and a draw one. {t.name} has {wins} wins and {draws} draws. "
            "How many points is that?")
