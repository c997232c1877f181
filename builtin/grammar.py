"""The stories of the built-in model: one grammar that both tells and reads them.

The grammar is the text `GRAMMAR` below together with the tables of words it
draws on.  It is compiled once into a tree of four kinds of node (Text, Slot,
Seq, Choice), each of which can `say` itself, for the generator, and `read`
itself back, for the reader.  Nothing is written down twice, so the reader
accepts exactly what the generator can tell.

What makes a story hang together are its variables.  A variable (`hero`,
`thing`, `place`, ...) stands for one row of a table, and a mention such as
`{hero.kind}` or `{hero.his}` shows one cell of that row.  While reading, a
variable is the set of rows that are still possible, and every mention narrows
it: after "a fox named Pip", a later "she" or "the rabbit Pip" leaves no row,
and the story is refused.  While telling, the first mention picks the row.

    python3 grammar.py --seed 1 -n 3      tell three stories
    python3 grammar.py --check FILE       judge FILE, one story a paragraph

Stories depend on the seed alone: the only random source is
`random.Random(seed).random()`, the one method whose sequence Python promises
to keep from version to version.
"""

import argparse
import random
import re
import sys

# ---------------------------------------------------------------- the tables


def article(noun):
    """`noun` with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


class Table:
    """Rows of words, found again by what a column shows.

    `index[column][text]` is the set of row numbers that show `text` there; a
    row with an empty cell is in no set of that column.  Every row also has
    the column `a`: the row's noun with its article.
    """

    def __init__(self, columns, rows, noun=None):
        self.default = columns[0]
        self.rows = [dict(zip(columns, row)) for row in rows]
        self.all = frozenset(range(len(self.rows)))
        self.index = {}
        for number, row in enumerate(self.rows):
            row["a"] = article(row[noun or self.default])
            for column, text in row.items():
                if text:
                    self.index.setdefault(column, {}).setdefault(text, set()).add(number)
        for texts in self.index.values():
            for text, numbers in texts.items():
                texts[text] = frozenset(numbers)


def words(column, text):
    """A table of one column, one row for each comma-separated entry."""
    return Table([column], [[entry.strip()] for entry in text.split(",")])


def lines(columns, text):
    """A table with one row a line, its cells parted by ` | `."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    return Table(columns.split(), rows)


SMALL = "rabbit hedgehog frog lamb puppy turtle penguin mole boy girl".split()
TALL = "bear pony elephant giraffe deer".split()
SWIMS = "otter duck frog turtle beaver penguin".split()
OTHERS = "fox mouse squirrel owl cat goat badger".split()
GIRLS = "Mia Lily Rosa Nell Tilly Luna Ada Ivy Poppy Hazel Dora Molly Bella Anna Zoe Ruby".split()
BOYS = "Pip Tom Max Ben Finn Leo Otis Hugo Sam Milo Jack Toby Oscar Gus Ned Theo".split()


def characters():
    """Every kind of character under every name that fits it."""
    for kind in sorted({*SMALL, *TALL, *SWIMS, *OTHERS}):
        for name in GIRLS + BOYS:
            girl = name in GIRLS
            if kind == ("boy" if girl else "girl"):
                continue
            yield [
                name,
                kind,
                *(("she", "her", "her") if girl else ("he", "him", "his")),
                kind in SMALL and "small",
                kind in TALL and "tall",
                kind in SWIMS and "swims",
                kind not in SWIMS + TALL and "walks",
            ]


def places():
    """Every place with every ordered pair of its hiding spots: one searched in vain, one not."""
    text = """
        in the forest  | behind a tall oak, under a fallen log, in a pile of leaves, beside the old stump
        in the garden  | behind the roses, under the bench, among the pumpkins, in a flower pot
        by the pond    | behind the reeds, under a lily leaf, among the round stones, in the tall grass
        on the hill    | behind a gray rock, under a thorn bush, in the heather, beside the spring
        on the beach   | behind a sand castle, under a big shell, among the rocks, in an old bucket
        in the meadow  | behind the haystack, under the daisies, among the poppies, in the clover
        on the farm    | behind the barn, under the cart, among the hens, in the hay
        in the village | behind the bakery, under the market stall, beside the well, in a wooden crate
        in the orchard | behind the ladder, under a pear tree, among the beehives, in a basket of apples
        by the mill    | behind the big wheel, under the stairs, among the flour sacks, in a barrel
    """
    for line in text.strip().splitlines():
        at, spots = (cell.strip() for cell in line.split("|"))
        spots = spots.split(", ")
        for first in spots:
            for second in spots:
                if first != second:
                    yield [at, at.split(" ", 1)[1], first, second]


CHARACTERS = Table("name kind he him his small tall swims walks".split(), characters(), noun="kind")

TABLES = {
    "hero": CHARACTERS,
    "friend": CHARACTERS,
    "trait": words("trait", "brave, kind, gentle, cheerful, curious, clever, eager, loyal, merry, quiet, playful, shy"),
    "place": Table("at the first second".split(), places()),
    "color": words("color", "red, blue, green, yellow, orange, purple, white, golden, pink, brown"),
    "thing": words("thing", "ball, scarf, hat, bell, button, book, marble, mitten, whistle, blanket, key, drum, ring, top"),
    "light": words("light", "kite, balloon, hat, scarf, ribbon, paper boat, handkerchief, shawl"),
    "tree": words("tree", "oak, pine tree, apple tree, willow, maple, elm, birch, chestnut tree"),
    "feeling": words("feeling", "sad, unhappy, upset, worried, gloomy"),
    "food": words("food", "apple, pear, peach, plum, orange, bun, muffin, pancake, pie, cheese roll, honey cake, oat biscuit"),
    "kin": words("kin", "grandmother, grandfather, aunt, uncle, cousin, godmother"),
    "raft": words("raft", "raft, log, barrel, boat, tub, old door, empty crate"),
    "dish": words("dish", "cup, vase, plate, bowl, jug, teapot, egg cup, pot"),
    "lamp": words("lamp", "lamp, candle, lantern, oil lamp"),
    "fear": lines("fear happened truth", """
        the thunder       | a storm came and the thunder rolled       | Thunder is only a loud noise in the sky
        the dark          | the fire went out and the room grew dark  | The dark is only the day asleep
        the wind          | the wind howled around the house          | The wind is only in a hurry
        the shadows       | the moon made long shadows on the wall    | Shadows are only the shapes of things we know
        the rain          | the rain beat hard against the window     | The rain is only watering the flowers
        the strange noise | there was a strange noise on the roof     | The noise is only a branch on the roof
    """),
    "toy": lines("toy part tool", """
        cart          | wheel  | a hammer and a nail
        wagon         | wheel  | a new peg
        kite          | tail   | a long string
        toy boat      | sail   | a needle and thread
        rag doll      | arm    | a needle and thread
        rocking horse | ear    | a drop of glue
        music box     | lid    | a tiny screw
        clock         | hand   | a tiny screw
        umbrella      | handle | a drop of glue
        birdhouse     | roof   | a hammer and a nail
        puppet        | leg    | a long string
    """),
    "baby": lines("baby home", """
        chick     | the henhouse
        duckling  | the nest in the reeds
        kitten    | the old barn
        piglet    | the red farmhouse
        owlet     | the hollow tree
        foal      | the white stable
        baby bat  | the cave
        baby bird | the nest in the elm
    """),
    "skill": lines("skill failed did", """
        ride a bicycle | fell off the bicycle      | rode all the way down the road
        whistle        | made no sound at all      | whistled a merry tune
        skate          | slipped on the ice        | skated in a big circle
        bake bread     | burned the bread          | baked a golden loaf
        juggle         | dropped the balls         | kept three balls in the air
        play the flute | played only squeaks       | played a lovely song
        jump rope      | tripped over the rope     | jumped ten times in a row
        walk on stilts | fell into the mud         | walked as tall as a house
        paint a horse  | painted a potato with legs | painted a fine brown horse
        dive           | landed flat on the water  | dived without a splash
    """),
    "craft": lines("craft stuff source", """
        necklace | shells   | the seashore
        crown    | daisies  | the long field
        basket   | twigs    | the woods
        hat      | straw    | the harvest field
        flute    | reeds    | the stream
        cake     | berries  | the hedge
        blanket  | wool     | the sheep pen
        mug      | clay     | the riverbank
        fan      | feathers | the henhouse
        lantern  | paper    | the paper mill
    """),
}

# Variables of one table that must differ, and the column in which they do.
APART = {("hero", "friend"): "name", ("friend", "hero"): "name"}

# --------------------------------------------------------------- the grammar

# A block `name:` is a sentence with its alternatives, one a line; a block
# `story name:` is a plot, one sentence a line.
#
#   [a|b|c]     one of these, `8*a` eight times as likely; may nest, may be empty
#   {var.col}   a cell of the variable's row; {var} is its first column, and
#               {Var.col} the same with a capital
#   <name>      the sentence of that name
#   ? ...       a sentence of a plot that may be left out
#   where v.c   the plot wants a row with something in that cell

GRAMMAR = """
opening:
    9*Once upon a time there [3*was|lived] {trait.a} [little |young |]{hero.kind} named {hero}.
    3*Once upon a time there was {trait.a} {hero.kind} named {hero} who lived near {place.the}.
    One day I met {trait.a} [little |young |]{hero.kind} named {hero}.
    Far away, near {place.the}, there lived {trait.a} [little |young |]{hero.kind} named {hero}.
    Long ago there was {trait.a} [little |young |]{hero.kind} named {hero}.

pal:
    {Hero.his} best friend was {friend.a} named {friend}.
    {hero} had a good friend, {friend.a} named {friend}.
    {Hero.he} lived next door to {friend.a} named {friend}.

meet:
    [Just then|Soon|After a while], {friend.a} named {friend} [came by|came along the path|stopped to look].

new end:
    From that day on, {hero} and {friend} were the best of friends.
    And so {hero} the {hero.kind} and {friend} the {friend.kind} became good friends.
    Then {hero} and {friend} walked home together, as happy as could be.
    After that, {hero} and {friend} played together every day.

old end:
    And they lived happily ever after.
    {hero} the {hero.kind} and {friend} the {friend.kind} are still friends to this day.
    {hero} and {friend} had never been so happy.
    And {hero} and {friend} laughed all the way home.

story lost:
    <opening>
    {Hero.he} had {color.a} {thing} [that {hero.he} loved very much|from {hero.his} {kin}].
    One [day|morning|afternoon], {hero} [played with the {thing}|went for a walk with the {thing}] {place.at}.
    [After a while|When it was time to go home|Suddenly], the {thing} was gone.
    ? {Hero.he} looked [here and there|all around], but {hero.he} could not find it.
    {hero} was very {feeling}[| and began to cry| and sat down on a stone].
    <meet>
    "Why are you so {feeling}?" asked {friend}.
    "I have lost my {color} {thing}," [said|sobbed] {hero}.
    ? "Do not [worry|cry], [I will help you|we will find it together]," said {friend}.
    First they looked {place.first}, but the {thing} was not there.
    Then they looked {place.second}, and there was the {color} {thing}!
    ? "Thank you, {friend}!" [said|cried] {hero}[| and jumped for joy].
    <new end>

story stuck:
    where hero.small friend.tall
    <opening>
    {Hero.he} had {color.a} {light} that {hero.his} {kin} had given {hero.him}.
    One windy [day|morning|afternoon], {hero} took the {light} to {place.the}.
    [Suddenly|All at once|Before long], the wind carried it up into {tree.a}.
    {hero} jumped [and jumped|as high as {hero.he} could], but {hero.he} was too small to reach it.
    ? "Oh no, my {light} is stuck in the {tree}!" cried {hero}.
    <meet>
    "I am [big and tall|tall enough], so I can help you," said {friend}.
    {friend} the {friend.kind} reached up into the {tree} and pulled down the {color} {light}.
    "Thank you, {friend}!" said {hero} with a big smile.
    ? [All afternoon|Until the sun went down], they played with the {light}.
    <new end>

story hungry:
    <opening>
    One [day|morning], {hero} set out for a long walk.
    {Hero.he} walked [and walked|for hours|as fast as {hero.he} could], and soon {hero.he} was very hungry.
    But {hero.he} had [left {hero.his} lunch at home|nothing to eat at all].
    ? {Hero.his} tummy rumbled [loudly|like a drum|like thunder].
    [On a bench|Under a tree|By the road], {hero} met {friend.a} named {friend}, who was eating {food.a}.
    ? {hero} looked at the {food}, but {hero.he} was too [shy|proud] to ask.
    "Are you hungry?" asked {friend}.
    "Yes, I have not eaten all day," said {hero}.
    {friend} [cut|broke] the {food} in two and gave {hero} the bigger half.
    ? "This is the best {food} in the world!" said {hero}.
    The next day, {hero} brought another {food} and shared it with {friend}.
    <new end>

story afraid:
    <opening>
    <pal>
    One [cold|dark|late autumn] night, {fear.happened}.
    {hero} was afraid of {fear} and hid under {hero.his} [bed|blanket|pillow].
    ? {Hero.his} [heart beat fast|knees shook|teeth chattered].
    {friend} heard {hero.him} and came in with {lamp.a}.
    "What is the matter, {hero}?" asked {friend}.
    "I am afraid of {fear}," said {hero}.
    "{fear.truth}," said {friend}.
    {friend} put the {lamp} by the bed and [sang a soft song|told a funny story|held {hero} by the hand].
    ? [Little by little|Soon], {hero} felt [safe|calm|better] again.
    From then on, {hero} was not afraid of {fear} any more.
    <old end>

story broken:
    <opening>
    {Hero.he} had {color.a} {toy} from {hero.his} {kin}.
    Every [day|morning|evening], {hero} [played with it|took it out] {place.at}.
    But one day {hero.he} [tripped over a stone|slipped on wet leaves|was not careful], and the {toy.part} of the {toy} came off.
    {Hero.he} was very {feeling}[| and did not want to play any more].
    <meet>
    "Do not be {feeling}, I can mend it," said {friend}.
    {friend} ran home and came back with {toy.tool}.
    [Carefully|Slowly|With great care], {friend} fixed the {toy.part} of the {toy}.
    [Now|In the end|At last] the {color} {toy} was as good as new.
    "How can I thank you?" asked {hero}.
    "Let me play with you," said {friend}.
    ? So they took turns until [supper|dark|the stars came out].
    <new end>

story river:
    where hero.walks friend.swims
    <opening>
    One [day|morning], {hero} wanted to visit {hero.his} {kin} on the other side of the river.
    {Hero.he} packed {food.a} in a [little|big|round] basket.
    But the bridge was [gone|broken|under water].
    There was no other way, and the water was [cold|deep|fast].
    [Just then|Soon|After a while], {friend.a} named {friend} [swam by|looked up out of the water].
    "I must bring this {food} across the river, but I cannot swim," said {hero}.
    "[That is easy|Do not worry], I can swim very well," said {friend}.
    {friend} the {friend.kind} found {raft.a}, and {hero} climbed on.
    Then {friend} pushed the {raft} across the river.
    [On the other side|Before long|At last], {hero} hugged {hero.his} {kin}.
    ? They cut the {food} in three and ate it together.
    <new end>

story baby:
    <opening>
    <pal>
    One [day|morning|evening], {hero} and {friend} heard a [tiny|small|sad] voice {place.at}.
    ? They looked {place.first}, but nobody was there.
    Then, {place.second}, they found {baby.a}.
    "I am lost and I want my mother," said the {baby}.
    "Where do you live?" asked {hero}.
    "I live in {baby.home}," said the {baby}.
    ? {friend} gave the {baby} a piece of {food}, and {hero} [dried its tears|wrapped it in a scarf|took it on {hero.his} back].
    They walked [and walked|over the fields|for a long time] until they saw {baby.home}.
    The mother of the {baby} ran out and kissed her little one.
    "Thank you, {hero} and {friend}," said the mother.
    ? {hero} felt [warm inside|very proud|happy to have helped].
    <old end>

story sorry:
    <opening>
    <pal>
    {friend} had {color.a} {dish} that {friend.he} loved very much.
    One [rainy|snowy|gray] day, {hero} bumped into the table, and the {dish} fell and broke [into pieces|in two].
    {hero} was afraid and hid the pieces [under the rug|behind the door|in a drawer].
    "Have you seen my {color} {dish}?" asked {friend}.
    "No, I have not," said {hero}[| in a small voice].
    That night, {hero} could not sleep.
    In the morning, {hero.he} went back to {friend}.
    "I broke your {dish}, and I am [so|very] sorry," said {hero}.
    {friend} was [sad|quiet|cross], but then {friend.he} smiled.
    ? "Thank you for telling the truth," said {friend}.
    Together they made a new {dish} out of clay and painted it {color}.
    <old end>

story skill:
    <opening>
    More than anything, {hero} wanted to learn to {skill}.
    ? Every [day|morning|evening], {hero.he} went out to practice.
    The first time {hero.he} tried, {hero.he} {skill.failed}.
    The second time, {hero.he} {skill.failed} again.
    "I will never learn to {skill}," [said|sighed|sobbed] {hero}.
    <meet>
    ? "When I learned to {skill}, I also {skill.failed}," said {friend}.
    "Do not give up, {hero}," [said {friend}|said the {friend.kind}].
    {hero} took a deep breath and tried [again|once more].
    This time {hero.he} {skill.did}!
    "[You did it|Well done], {hero}!" [cheered|shouted|called] {friend}.
    ? {hero} ran home to tell {hero.his} {kin}.
    <new end>

story birthday:
    <opening>
    <pal>
    "Tomorrow is my birthday," said {friend} one [day|evening].
    {hero} wanted to give {friend} a present, but {hero.he} had no [money|coins].
    ? {Hero.he} thought [and thought|for a long time|hard], and soon {hero.he} had an idea.
    So {hero.he} went to {craft.source} and brought home [some|a bag full of] {craft.stuff}.
    All night long, {hero} worked by the light of {lamp.a}.
    When the sun came up, {hero.he} had made {craft.a} out of {craft.stuff}.
    {Hero.he} put the {craft} in {color.a} box and ran to the house of {friend}.
    "Happy birthday, {friend}!" [said|sang|called] {hero}.
    {friend} opened the box and saw the {craft}.
    "This {craft} is the best present of all," said {friend}.
    <old end>
"""

# ----------------------------------------------------------------- the nodes
#
# `say(env, rng)` returns the text and the variables after it; `read(view,
# pos, env)` yields every (end, env) with which the node matches at `pos`.
# `env` maps a variable to the rows still possible and is never changed in
# place, so that backtracking needs no undoing.


def narrow(env, var, rows):
    """`env` with `var` limited to `rows`, or None if a variable is left without a row."""
    env = {**env, var: rows & env.get(var, TABLES[var].all)}
    for (one, other), column in APART.items():
        shown = {TABLES[one].rows[row][column] for row in env[var]} if one == var else ()
        if len(shown) == 1:
            taken = TABLES[other].index[column][shown.pop()]
            env[other] = env.get(other, TABLES[other].all) - taken
    return env if all(env.values()) else None


class View:
    """A text being read, and how far any reading of it has come."""

    def __init__(self, text):
        self.text = text
        self.reach = 0

    def match(self, word, pos):
        """Whether `word` stands at `pos`; notes how much of it does."""
        if self.text.startswith(word, pos):
            self.reach = max(self.reach, pos + len(word))
            return True
        if pos + len(word) > len(self.text) and word.startswith(self.text[pos:]):
            self.reach = len(self.text)
        return False


class Text:
    """Fixed words."""

    def __init__(self, text):
        self.text = text

    def say(self, env, rng):
        return self.text, env

    def read(self, view, pos, env):
        if view.match(self.text, pos):
            yield pos + len(self.text), env


class Slot:
    """A mention of a variable: one cell of its row."""

    def __init__(self, name):
        var, _, column = name.partition(".")
        self.capital = var[0].isupper()
        self.var = var.lower()
        self.table = TABLES[self.var]
        self.column = column or self.table.default

    def show(self, text):
        return text[0].upper() + text[1:] if self.capital else text

    def say(self, env, rng):
        left = sorted(env.get(self.var, self.table.all))
        row = left[int(rng.random() * len(left))]
        return self.show(self.table.rows[row][self.column]), narrow(env, self.var, frozenset([row]))

    def read(self, view, pos, env):
        for text, rows in self.table.index[self.column].items():
            if view.match(self.show(text), pos):
                narrowed = narrow(env, self.var, rows)
                if narrowed:
                    yield pos + len(text), narrowed


class Seq:
    """Parts one after the other."""

    def __init__(self, parts):
        self.parts = parts

    def say(self, env, rng):
        texts = []
        for part in self.parts:
            text, env = part.say(env, rng)
            texts.append(text)
        return "".join(texts), env

    def read(self, view, pos, env, at=0):
        if at == len(self.parts):
            yield pos, env
            return
        for end, after in self.parts[at].read(view, pos, env):
            yield from self.read(view, end, after, at + 1)


class Choice:
    """One of several parts, each as often as its weight says."""

    def __init__(self, weighted):
        self.weighted = weighted
        self.total = sum(weight for weight, _ in weighted)

    def say(self, env, rng):
        ticket = rng.random() * self.total
        for weight, part in self.weighted:
            ticket -= weight
            if ticket < 0:
                break
        return part.say(env, rng)

    def read(self, view, pos, env):
        for _, part in self.weighted:
            yield from part.read(view, pos, env)


# ------------------------------------------------------------- the compiler

TOKEN = re.compile(r"\d+\*|[\[\]|]|\{[^}]*\}|<[^>]*>|[^\[\]|{}<>]+")


def compile_choice(tokens, rules):
    """The alternatives up to a closing bracket or the end of `tokens` (a list, last token first)."""
    weighted, parts, weight = [], [], 1
    while tokens and tokens[-1] != "]":
        token = tokens.pop()
        if token == "|":
            weighted.append((weight, Seq(parts)))
            parts, weight = [], 1
        elif token == "[":
            parts.append(compile_choice(tokens, rules))
            tokens.pop()
        elif token[0] == "{":
            parts.append(Slot(token[1:-1]))
        elif token[0] == "<":
            parts.append(rules[token[1:-1]])
        elif token[-1] == "*":
            weight = int(token[:-1])
        else:
            parts.append(Text(token))
    weighted.append((weight, Seq(parts)))
    return Choice(weighted)


def compile_template(template, rules):
    return compile_choice(TOKEN.findall(template)[::-1], rules)


def compile_grammar(text):
    """The plots of the grammar: `name -> (where, sentences, story)`.

    `where` is what a plot asks of its variables, as an env; `sentences` are
    its lines one by one; `story` is the whole of them.  Every sentence is
    told with one space behind it, so that one left out leaves no trace.
    """
    rules, plots = {}, {}
    for block in re.split(r"\n\s*\n", text.strip()):
        head, *body = [line.strip() for line in block.splitlines()]
        name = head.rstrip(":")
        if not name.startswith("story "):
            rules[name] = compile_template("|".join(body), rules)
            continue
        where, sentences, parts = {}, [], []
        for line in body:
            if line.startswith("where "):
                for condition in line.split()[1:]:
                    var, column = condition.split(".")
                    (rows,) = TABLES[var].index[column].values()
                    where = narrow(where, var, rows)
                continue
            optional = line.startswith("? ")
            sentence = Seq([compile_template(line.removeprefix("? "), rules), Text(" ")])
            sentences.append(sentence)
            parts.append(Choice([(1, sentence), (1, Text(""))]) if optional else sentence)
        plots[name.removeprefix("story ")] = where, sentences, Seq(parts)
    return plots


PLOTS = compile_grammar(GRAMMAR)

# ------------------------------------------------------ telling and reading


def tell(rng):
    """One story, from a `random.Random`."""
    plots = list(PLOTS.values())
    where, _, story = plots[int(rng.random() * len(plots))]
    return story.say(where, rng)[0].strip()


def stories(seed):
    """Stories without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield tell(rng)


def view_of(text):
    """`text` as the nodes read it: single spaces, and one behind every sentence."""
    return View(" ".join(text.split()) + " ")


def reads(node, view, where):
    """Whether `node` reads the whole of `view`."""
    return any(end == len(view.text) for end, _ in node.read(view, 0, where))


def accepts(sentence):
    """Whether `sentence` is one that some story could tell."""
    view = view_of(sentence)
    return any(
        reads(node, view, where) for where, sentences, _ in PLOTS.values() for node in sentences
    )


def accepts_story(text):
    """Whether `text` is a whole story, and if not, why not.

    The reason is "unfinished" if the text could still go on to be one.
    """
    view = view_of(text)
    for name, (where, _, story) in PLOTS.items():
        if reads(story, view, where):
            return True, name
    if view.reach >= len(view.text) - 1:
        return False, "unfinished"
    read, rest = view.text[: view.reach], view.text[view.reach :]
    return False, f"lost the thread at: {read[-40:]}^{rest[:40].strip()}"


def split_sentences(text):
    """The sentences of a story; one still unfinished at the end comes last."""
    return re.split(r'(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]")\s+(?=["A-Z])', " ".join(text.split()))


def main():
    parser = argparse.ArgumentParser(description="Tell stories, or judge them.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-n", type=int, default=1, help="how many stories to tell")
    parser.add_argument("--check", metavar="FILE", help="judge FILE, one story a paragraph")
    args = parser.parse_args()
    if args.check is None:
        for _, story in zip(range(args.n), stories(args.seed)):
            print(story, end="\n\n")
        return 0
    with open(args.check, encoding="utf-8") as file:
        paragraphs = [p for p in re.split(r"\n\s*\n", file.read()) if p.strip()]
    refused = 0
    for number, paragraph in enumerate(paragraphs, 1):
        accepted, reason = accepts_story(paragraph)
        refused += not accepted
        print(f"{number}: {'accepted' if accepted else 'refused'} ({reason})")
        for sentence in () if accepted else split_sentences(paragraph):
            if not accepts(sentence):
                print(f"    not a sentence: {sentence}")
    print(f"{len(paragraphs) - refused} of {len(paragraphs)} accepted")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
