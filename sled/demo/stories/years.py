"""Stories of ages, savings and wages."""


def age_later(t):
    age, older, years = t.number(3, 45), t.number(2, 20), t.number(2, 20)
    a, b = t.two_names
    now = t.step("Now", age, "+", older)
    t.step("Later", now, "+", years)
    return f"{a} is {age} years old. {b} is {older} years older. How old is {b} in {years} years?"


def age_times(t):
    age, factor = t.number(3, 20), t.number(2, 6)
    who, elder = t.name, t.pick("mother", "father", "aunt", "teacher")
    old = t.step(elder.capitalize(), age, "*", factor)
    t.step("Older", old, "-", age)
    return (f"{who} is {age}. The {elder} of {who} is {factor} times as old. "
            f"By how many years is the {elder} older?")


def saving(t):
    start, weekly, weeks = t.number(5, 200, 5), t.number(2, 25), t.number(2, 20)
    saved = t.step("Saved", weekly, "*", weeks)
    t.step("All", saved, "+", start)
    coins = t.currency
    return (f"{t.name} has {start} {coins} and saves {weekly} {coins} a week. "
            f"How much is it after {weeks} weeks?")


def saving_for(t):
    have, weekly, weeks = t.number(5, 150, 5), t.number(2, 25), t.number(2, 20)
    price = have + weekly * weeks
    missing = t.step("Missing", price, "-", have)
    t.step("Weeks", missing, "/", weekly)
    what = t.pick("bike", "game", "guitar", "camera")
    return (f"A {what} costs {price} {t.currency}. {t.name} has {have} and saves {weekly} a week. "
            "After how many weeks is it enough?")


def wages(t):
    hours, rate, tip = t.number(2, 15), t.number(5, 30), t.number(2, 35)
    pay = t.step("Pay", hours, "*", rate)
    t.step("All", pay, "+", tip)
    coins = t.currency
    return (f"{t.name} works {hours} hours for {rate} {coins} an hour and gets {tip} {coins} in tips. "
            "How much is it in all?")


def overtime(t):
    hours, more, rate, extra = t.number(4, 15), t.number(2, 9), t.number(5, 20), t.number(2, 12)
    pay = t.step("Pay", hours, "*", rate)
    late_rate = t.step("Rate", rate, "+", extra)
    late = t.step("Extra", more, "*", late_rate)
    t.step("All", pay, "+", late)
    return (f"{t.name} works {hours} hours for {rate} {t.currency} an hour, then {more} hours for {extra} "
            "more an hour. How much is earned?")
