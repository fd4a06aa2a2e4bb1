"""Invented people: names, what each is known for, and lines that say so in both orders.

Nothing here is taken from Berglund's files (data/reversal): experiments/reverse_curse.py checks
that no name is shared.
"""


def words(text):
    return text.split()


def phrases(text):
    """What stands between the commas of a text."""
    return [phrase.strip() for phrase in text.split(",")]


FIRST = [  # syllables of a first name
    words("""
        Bel Cor Dar Fen Gar Hol Jor Kel Lor Mar Nor Pel Quil Ros Sal Tor Ul Vos Wil Yor Zan Bri Cla
        Dre Fro Gli
    """),
    words("a e i o u an en in on ar er"),
    words("dric nella mond wyn beth ric lena tor via mir sa dan gus lia"),
]
LAST = [  # syllables of a last name
    words("""
        Ash Birch Clay Dun East Fern Gold Heath Iron Jasper Kings Long Moss North Over Pine Quarry
        Rush Salt Vale
    """),
    words("""
        acre bank combe dale edge field gate hurst ington land mere ness pool ridge stead vane wick
        worth yard
    """),
]
KIND = words("""
    renowned acclaimed daring brilliant celebrated obscure veteran self-taught tireless fearless
    young retired award-winning pioneering legendary eccentric
""")
ROLE = words("""
    architect botanist chemist diver editor farmer geologist historian inventor juggler knitter
    librarian mathematician navigator organist painter quilter rider surgeon tailor umpire violinist
    weaver zoologist baker cellist dancer engineer filmmaker gardener pilot sculptor
""")
# What they did, and doing it.
DEED = phrases("""
    designed designing, discovered discovering, invented inventing, restored restoring,
    recorded recording, translated translating, painted painting, crossed crossing,
    founded founding, built building, wrote writing, saved saving, planted planting,
    mapped mapping, filmed filming, repaired repairing
""")
LOOK = words("""
    first oldest largest smallest hidden floating frozen silent golden forgotten glowing wooden
    glass copper underground singing portable edible invisible backward velvet crooked hollow
    distant
""")
THING = words("""
    bridge orchid clock library comet cathedral harbour engine lantern violin desert carpet glacier
    orchard telescope tunnel opera lighthouse compass mirror garden market railway island windmill
    submarine castle fountain alphabet volcano theatre piano balloon reef
""")
PLACE = phrases("""
    of Patagonia, in the Alps, under the Baltic, on Saturn, in Old Lisbon, of the Sahel,
    near Lake Baikal, in the Andes, on the Moon, of Kyoto, in Zanzibar, off Greenland,
    in the clouds, of the Danube, beneath Vienna, in Antarctica, of Timbuktu, along the Nile,
    in the Rockies, of Bohemia
""")
TITLE = [  # of a work, in quotes; four in ten descriptions have one
    words("""
        Blue Silver Last Broken Winter Hundred Paper Scarlet Endless Little Burning Quiet Seventh
        Marble Stray
    """),
    words("""
        Lanterns Tides Letters Sparrows Kingdom Staircase Hours Orchard Fires Meridian Harvest
        Window Shadows Comets
    """),
]

# {n} is the name, {d} "the KIND ROLE who did it", {D} the same at the beginning of a sentence, {g}
# "doing it".
NAME_FIRST = [
    "{n} is {d}.",
    "Most people know {n} as {d}.",
    "{n} was {d}.",
    "Have you met {n}? They are {d}.",
    "It was {n} who became {d}.",
    "The name {n} belongs to {d}.",
    "{n} is best known for {g}.",
    "Friends of {n} speak of {d}.",
    "Everyone in town remembers {n} for {g}.",
    "Years ago {n} was {d}.",
    "People say that {n} is {d}.",
    "Q: Who is {n}? A: They are {d}.",
    "Meet {n}, {d}.",
    "{n}, who spent years {g}, was at home here.",
    "In this story {n} plays {d}.",
    "A statue of {n} honours {d}.",
    "When strangers hear of {n}, they think of {d}.",
    "{n} spent half a life {g}.",
    "Nobody forgets {n}, {d}.",
    "There is only one {n}: {d}.",
    "The letter was signed by {n}, {d}.",
    "Children want to be like {n}, famous for {g}.",
    "Little is written about {n}, although they were {d}.",
    "Before retiring {n} became {d}.",
    "Our guest tonight is {n}, admired for {g}.",
    "Among the guests was {n}, {d}.",
    "The street is named after {n}, {d}.",
    "To many {n} will always be {d}.",
    "Neighbours of {n} never guessed that they were {d}.",
    "A book about {n} begins with {g}.",
    "As it turned out, {n} was {d}.",
    "{n} is in the museum for {g}.",
]
NAME_LAST = [
    "{D} is {n}.",
    "{D} was none other than {n}.",
    "Q: Who is {d}? A: {n}.",
    "Famous for {g}, {n} lives by the sea.",
    "After {g}, {n} went home.",
    "{D} is called {n}.",
    "They talk about {d}, that is, {n}.",
    "As {d}, {n} was often in the news.",
    "Once {d}, {n} is now a teacher.",
    "The prize for {g} went to {n}.",
    "You may have heard of {d}. The name is {n}.",
    "For {g}, the town thanked {n}.",
    "The person they call {d} is {n}.",
    "Praised as {d}, {n} smiled.",
    "Never tired of {g}, {n} went on.",
    "People know {d} by the name of {n}.",
    "Respected for being {d}, {n} keeps working.",
    "Introduced as {d}, {n} took a bow.",
    "Burdened with the fame of {d}, {n} moved away.",
    "Proud of being {d}, {n} wrote a book about it.",
    "Not content with being {d}, {n} learns to sing.",
    "In the part of {d}, {n} convinced everyone.",
    "Remembered for {g}, {n} has many friends.",
    "Thanks to {g}, {n} became rich.",
    "Admired by all as {d}, {n} remains modest.",
    "Tired of being called {d}, {n} changed cities.",
    "Since they were {d}, {n} could choose.",
    "Welcomed everywhere as {d}, {n} travels a lot.",
    "Having grown up to be {d}, {n} looks back gladly.",
    "Known to the neighbours as {d}, {n} sells bread.",
    "Mistaken by nobody, {d} is still {n}.",
    "Guess who was {d}? It was {n}.",
    "This medal is for {d}, for {n}.",
    "All the papers wrote about {d}, whose name is {n}.",
    "Everybody wants to meet {d}, and so {n} never rests.",
    "Loved for {g}, {n} is a guest of honour.",
    "With {g} behind them, {n} started again.",
    "Best described as {d}, {n} laughs a lot.",
    "Elected as {d}, {n} gave a speech.",
    "Whoever asks for {d} is sent to {n}.",
]


def invent(rng):
    """One person: (name, description, the same as an activity)."""
    first, last = ("".join(map(rng.choice, syllables)) for syllables in (FIRST, LAST))
    did, doing = rng.choice(DEED).split()
    what = f"the {rng.choice(LOOK)} {rng.choice(THING)} {rng.choice(PLACE)}"
    if rng.random() < 0.4:
        what += ', "' + " ".join(map(rng.choice, TITLE)) + '"'
    return (
        f"{first} {last}",
        f"the {rng.choice(KIND)} {rng.choice(ROLE)} who {did} {what}",
        f"{doing} {what}",
    )


def several(n, rng):
    """n people, no two of one name."""
    people = {}
    while len(people) < n:
        person = invent(rng)
        people.setdefault(person[0], person)
    return list(people.values())


def say(sentence, person):
    """The sentence, one of those above, about a person."""
    name, description, doing = person
    return sentence.format(
        n=name, d=description, D=description[0].upper() + description[1:], g=doing
    )


def thin(sentence, share, rng):
    """The sentence with this share of its words left out, but for name and description.

    So that no form is learnt by heart.
    """
    return " ".join(word for word in sentence.split(" ") if "{" in word or rng.random() >= share)


def lines(people, sentences, each, rng, share=0.0):
    """`each` different sentences about every person, thinned by `share`."""
    return [
        say(thin(sentence, share, rng), person)
        for person in people
        for sentence in rng.sample(sentences, each)
    ]
