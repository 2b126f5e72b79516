"""Short English words to read: common ones to train on, others to test on."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN_WORDS = _words(
    """
    ace act add age ago air all and ant any ape arm art ask bad bag ball bank bark base
    bath bear beat bed bee bell belt best big bike bird bit black blow blue boat body
    bold bone book born box boy bread brick brown bus busy but buy cake call calm camp
    can car care cart case cat chair chin city clay clean clock coal coat coin cold come
    cook corn cow crab cry cup cut dad dark date day deep deer desk dish dog door down
    draw dress drum duck dust each ear early earth east eat edge egg eight end even eye
    face fact fair fall far farm fast fat fence few fig film find fine fire fish five
    flag flat floor fly foam fog food foot fork four fox free frog fruit full fun game
    gate gift girl give glad glass go goat gold good grass green grow gum hair half hand
    hat head hear heat help hen her hide high hill hit home hop horn horse hot hour
    house ice idea in ink iron it jam jar jet job joke jump just keep kid kind king kiss
    knee knife lake lamp land last late law leaf left leg lemon lift lion lip live log
    long look lost love luck lunch make man map mark meat men milk mind mix money moon
    more moth mouse move mud my nail name near neck nest new nice nine no nose not nut
    oak off oil old on open out owl own page pan park part path pay pear pen pet pick
    pie pig pin pink pipe plan play pool pot price pull pure queen quiz rain rat read
    rest rice ride ring river road rock roof rope rose run safe sail salt sand say sea
    seed set shell ship shop show sign six skin sky sleep slow snow sock soft son song
    soup spoon star step stop sugar sun swim table tail tap tea ten test tie time to toe
    top toy tree try two uncle up use van view voice walk wall war wash wax week west
    wet wheel why win wing wise wolf wood word work year yes you zero zone zoo
    """
)
TEST_WORDS = _words(
    """
    able ankle apple arch axe baby bacon band beach bean bolt bow brain brush bug bulb
    cab cage cave chalk cheek child claw cliff cloud club crown cub dance debt dice dive
    do dot dove dream echo elbow elm exit fan feast fin flame flock fur gem ghost glove
    grape hail harp hay he hero hive honey hook hut inch ivy jazz jelly juice kite knot
    lace lane lens lid lock maid mask maze melon mint mole monk navy net ninja north oat
    ocean olive onion oven ox paint palm peach pearl piano plum pony quilt rabbi rake
    reef robe rug ruler salad scarf seal shark shoe silk skate sled so spy stamp storm
    swan tent thumb tiger toast tooth tulip urn us vase vest vine wagon wand we whale
    wheat yacht yolk zebra zip
    """
)
