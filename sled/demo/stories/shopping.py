"""Stories of shopping."""

WORDS = {3: "three", 4: "four", 5: "five", 6: "six"}


def cost(t):
    n, price = t.number(2, 20), t.number(2, 40)
    t.step("Cost", n, "*", price)
    who, things, coins = t.name, t.things, t.currency
    return t.pick(f"{who} buys {n} {things} at {price} {coins} each. How much is that?",
                  f"{who} buys {n} packs of {things}. A pack costs {price} {coins}. How much is that?")


def discount_for_many(t):
    n, price, percent, least = t.number(2, 9), t.number(5, 50, 5), t.number(10, 50, 10), t.number(3, 6)
    full = t.step("Cost", n, "*", price)
    if n >= least:
        off = t.step("Off", full, "%", percent)
        t.step("Pay", full, "-", off)
    return (f"{t.name} buys {n} {t.things} at {price} {t.currency} each, "
            f"{percent}% off for {WORDS[least]} or more: how much?")


def sale(t):
    price, percent = t.number(10, 400, 10), t.number(10, 90, 10)
    off = t.step("Off", price, "%", percent)
    t.step("Pay", price, "-", off)
    what = t.pick("coat", "bike", "lamp", "watch", "chair", "bag")
    return t.pick(f"A {what} costs {price} {t.currency}. Now it is {percent}% off. What is the price?",
                  f"{t.name} buys a {what} of {price} {t.currency} with {percent}% off. How much is paid?")


def price_rise(t):
    price, percent = t.number(10, 400, 10), t.number(10, 70, 10)
    more = t.step("More", price, "%", percent)
    t.step("Price", price, "+", more)
    what = t.pick("ticket", "room", "phone", "pass", "meal")
    return f"A {what} cost {price} {t.currency}, and the price went up by {percent}%. What does it cost now?"


def two_goods(t):
    n, p, m, q = t.number(2, 12), t.number(2, 25), t.number(2, 12), t.number(2, 25)
    first = t.step("First", n, "*", p)
    second = t.step("Second", m, "*", q)
    t.step("All", first, "+", second)
    one, two = t.two_things
    coins = t.currency
    return (f"{t.name} buys {n} {one} for {p} {coins} each and {m} {two} for {q} {coins} each. "
            "How much is it in all?")


def change(t):
    n, price, cash = t.number(2, 12), t.number(2, 25), t.number(20, 300, 10)
    paid = t.step("Cost", n, "*", price)
    t.step("Change", cash, "-", paid)
    coins = t.currency
    return (f"{t.name} pays {n} {t.things} of {price} {coins} each with {cash} {coins}. "
            "How much change is there?")


def coupon(t):
    n, price, off = t.number(2, 12), t.number(3, 30), t.number(2, 35)
    full = t.step("Cost", n, "*", price)
    t.step("Pay", full, "-", off)
    coins = t.currency
    return (f"{n} {t.things} cost {price} {coins} each. {t.name} has a coupon for {off} {coins}. "
            "How much is left to pay?")


def packs(t):
    size, count, price = t.number(2, 20), t.number(2, 12), t.number(2, 20)
    needed = size * count
    t.step("Packs", needed, "/", size)
    t.step("Cost", count, "*", price)
    return (f"{t.name} needs {needed} {t.things}. They come in packs of {size}, and a pack costs "
            f"{price} {t.currency}. How much is it?")


def bill(t):
    food, drinks, friends = t.number(10, 150), t.number(4, 90), t.number(2, 6)
    total = t.step("Bill", food, "+", drinks)
    t.step("Each", total, "/", friends)
    coins = t.currency
    return (f"{friends} friends share a bill: {food} {coins} for food and {drinks} {coins} for drinks. "
            "How much does each pay?")


def tickets(t):
    adults, kids, price = t.number(2, 9), t.number(2, 12), t.number(4, 30, 2)
    half = t.step("Child", price, "/", 2)
    first = t.step("Adults", adults, "*", price)
    second = t.step("Kids", kids, "*", half)
    t.step("All", first, "+", second)
    place = t.pick("zoo", "fair", "museum", "show")
    return (f"A {place} ticket is {price} {t.currency}, and children pay half. What do {adults} adults and "
            f"{kids} children pay?")


def membership(t):
    fee, monthly, months = t.number(5, 100, 5), t.number(3, 30), t.number(2, 15)
    total = t.step("Months", monthly, "*", months)
    t.step("All", total, "+", fee)
    club = t.pick("gym", "chess club", "library", "pool")
    return (f"A {club} asks {fee} {t.currency} to join and {monthly} a month. What does {t.name} pay "
            f"for {months} months?")
