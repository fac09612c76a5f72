"""Families of tools: how they are declared, asked for and answered.

A family is a dict: names, descriptions, parameters, asks, result. A parameter is (names, type, descriptions,
value maker); asks name parameters by their number, and one that an ask does not name is optional or
left out. `result` gives what the tool returns and the sentence that uses it.
"""

import json

from words import CITIES, CUISINES, CURRENCIES, LANGUAGES, PEOPLE, ROOMS, SKIES

CONSONANTS, VOWELS = "bcdfghjklmnprstvwxz", "aeiou"
TEXT = []  # common nouns, from WordNet


def made_up(rng, low=2, high=4):
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(low, high)))
    return word + rng.choice(["", "", rng.choice("nrstlmk")])


def jumble(rng):
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))


def proper(rng, real):
    r = rng.random()
    if r < 0.45:
        return rng.choice(real)
    if r < 0.80:
        return made_up(rng).capitalize()
    if r < 0.90:
        return made_up(rng, 2, 3).capitalize() + " " + made_up(rng, 2, 3).capitalize()
    return jumble(rng).capitalize()


def city(rng): return proper(rng, CITIES)
def person(rng): return proper(rng, PEOPLE)
def noun(rng): return rng.choice(TEXT) if rng.random() < 0.7 else made_up(rng)
def phrase(rng): return " ".join(noun(rng) for _ in range(rng.randint(1, 4)))
def date(rng): return f"{rng.randint(2023, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
def clock(rng): return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
def email(rng): return f"{rng.choice([rng.choice(PEOPLE).lower(), made_up(rng)])}@{rng.choice([made_up(rng), noun(rng)])}.{rng.choice(['com', 'org', 'net'])}"
def symbol(rng): return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))
def url(rng): return f"https://{noun(rng)}.{rng.choice(['com', 'org', 'net'])}/{noun(rng)}"
def file_name(rng): return f"{noun(rng)}.{rng.choice(['txt', 'pdf', 'csv', 'json', 'md'])}"


def code(rng):
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return letters + rng.choice(["-", ""]) + "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))


def whole(low, high): return lambda rng: rng.randint(low, high)
def one_of(*values): return lambda rng: rng.choice(values)


CITY = (["city", "city", "location", "place", "town"], "string", ["The city", "City name", "Name of the city", "The city's name", "Which city", ""], city)
PERSON = (["to", "recipient", "person", "name"], "string", ["Who gets it", "The recipient", "Name of the person", ""], person)
DATE = (["date", "day"], "string", ["The date", "Date as YYYY-MM-DD", ""], date)
TIME = (["time", "at"], "string", ["The time", "Time as HH:MM", ""], clock)
ROOM = (["room", "place"], "string", ["Which room", "The room", ""], one_of(*ROOMS))


def say(sentence, /, **result):
    return result, sentence


FAMILIES = [
    dict(id="today", names=["get_date", "today", "current_date", "what_day"], about=["Today's date.", "Gives the current date.", ""], params=[],
         asks=["What day is it?", "What is the date today?", "What is today's date?", "Which day is today?", "Tell me the date."],
         result=lambda a, r: (lambda d: say(f"Today is {d}.", date=d))(date(r))),
    dict(id="weather", names=["get_weather", "get_weather", "weather", "current_weather", "check_weather", "weather_lookup", "get_forecast"],
         about=["Get the weather in a city.", "Current weather of a place.", "Gives the weather.", "Look up the current weather.", "Get the current weather.",
                "Get the current weather for a city.", "Get current weather", "Weather of a city", ""],
         params=[CITY, (["unit", "units"], ["celsius", "fahrenheit"], ["Unit of temperature", ""], None)],
         asks=["What is the weather in {0}?", "What's the weather like in {0}?", "How is the weather in {0}?", "Weather in {0}?", "Weather {0}",
               "What is the weather in {0} in {1}?", "Tell me the weather in {0} in {1}.", "Is it raining in {0}?", "Is it cold in {0}?",
               "Is it sunny in {0} today?", "What is the weather like in {0} right now?", "I am going to {0}. What is the weather there?",
               "How warm is it in {0}?", "Check the weather in {0}.", "Give me the weather for {0}.", "What's the temperature in {0}?",
               "What is the temperature in {0} in {1}?", "How is the weather in {0} today?", "Do I need an umbrella in {0}?"],
         result=lambda a, r: (lambda t, s: r.choice([
             say(f"It is {s} in {a[0]}, {t} degrees.", temperature=t, condition=s),
             say(f"It is {s} in {a[0]}, {t} degrees.", condition=s, temperature=t),
             say(f"It is {t} degrees in {a[0]}.", temperature=t)]))(r.randint(-15, 38), r.choice(SKIES))),
    dict(id="time", names=["get_time", "current_time", "time_in_city", "get_local_time", "clock"],
         about=["Get the local time of a city.", "What time it is somewhere.", "Gives the current time in a city.", ""],
         params=[CITY],
         asks=["What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}.", "How late is it in {0}?", "Current time in {0}?",
               "What's the local time in {0}?", "Do you know what time it is in {0}?"],
         result=lambda a, r: (lambda t: say(f"It is {t} in {a[0]}.", time=t))(clock(r))),
    dict(id="email", names=["send_email", "email", "mail", "write_email", "send_mail"],
         about=["Send an email.", "Sends an email to somebody.", "Write an email to an address.", ""],
         params=[(["to", "address", "recipient"], "string", ["Address", "Who gets it", "The email address", ""], email),
                 (["subject", "title"], "string", ["The subject", "Subject line", ""], phrase)],
         asks=["Send an email to {0} about {1}.", "Email {0} about {1}.", "Write an email to {0} with the subject {1}.",
               "Send {0} an email with the subject \"{1}\".", "Mail {0}: {1}."],
         result=lambda a, r: say(f"The email to {a[0]} has been sent.", status="sent")),
    dict(id="message", names=["send_message", "text", "message", "send_text", "send_sms"],
         about=["Send a text message to a person.", "Sends a message.", "Text somebody.", ""],
         params=[PERSON, (["text", "body", "message", "content"], "string", ["The text", "What to say", ""], phrase)],
         asks=["Send a message to {0} saying {1}.", "Text {0}: {1}.", "Tell {0} that {1}.", "Message {0}: {1}.", "Send {0} the message \"{1}\".",
               "Write {0} a message: {1}."],
         result=lambda a, r: say(f"The message to {a[0]} has been sent.", status=r.choice(["sent", "ok", "delivered"]))),
    dict(id="alarm", names=["set_alarm", "alarm", "wake_me", "create_alarm"],
         about=["Set an alarm.", "Sets an alarm for a time.", "Rings at a given time.", ""],
         params=[TIME],
         asks=["Set an alarm for {0}.", "Wake me at {0}.", "Wake me up at {0}.", "I need an alarm at {0}.", "Alarm at {0}.", "Set the alarm to {0}."],
         result=lambda a, r: say(f"The alarm is set for {a[0]}.", status=r.choice(["set", "ok"]))),
    dict(id="timer", names=["set_timer", "start_timer", "timer", "countdown"],
         about=["Start a timer.", "Starts a countdown of some minutes.", ""],
         params=[(["minutes", "duration"], "integer", ["How many minutes", "Minutes", ""], whole(1, 120))],
         asks=["Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Timer for {0} minutes.", "Count down {0} minutes.", "Remind me in {0} minutes."],
         result=lambda a, r: say(f"The timer runs for {a[0]} minutes.", status=r.choice(["started", "running"]))),
    dict(id="currency", names=["convert_currency", "exchange", "currency", "convert_money"],
         about=["Convert an amount of money.", "Converts between currencies.", "Exchange rates.", ""],
         params=[(["amount", "value"], "number", ["How much", "The amount", ""], whole(1, 5000)),
                 (["from", "source"], "string", ["Currency to convert from", ""], one_of(*CURRENCIES)),
                 (["to", "target"], "string", ["Currency to convert to", ""], one_of(*CURRENCIES))],
         asks=["Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "What are {0} {1} in {2}?", "Change {0} {1} into {2}.", "{0} {1} in {2}?"],
         result=lambda a, r: (lambda v: say(f"{a[0]} {a[1]} are {v} {a[2]}.", result=v))(r.randint(1, 9000))),
    dict(id="stock", names=["get_stock_price", "stock_price", "quote", "get_quote"],
         about=["Get the price of a stock.", "Current stock price for a symbol.", "Looks up a share price.", ""],
         params=[(["symbol", "ticker"], "string", ["Ticker symbol", "The symbol", ""], symbol)],
         asks=["What is the stock price of {0}?", "How much is a share of {0}?", "Price of {0} stock?", "What does {0} trade at?", "Get me a quote for {0}.",
               "How is {0} stock doing?", "Look up the stock {0}."],
         result=lambda a, r: (lambda v: say(f"The price of {a[0]} is {v}.", price=v))(round(r.uniform(1, 900), 2))),
    dict(id="flight", names=["book_flight", "reserve_flight", "flight"],
         about=["Book a flight.", "Books a flight between two cities.", ""],
         params=[(["from", "origin"], "string", ["Where from", "Departure city", ""], city),
                 (["to", "destination"], "string", ["Where to", "Arrival city", ""], city), DATE],
         asks=["Book a flight from {0} to {1} on {2}.", "I want to fly from {0} to {1} on {2}.", "Reserve a flight from {0} to {1} for {2}.",
               "Get me a flight from {0} to {1} on {2}.", "Fly me from {0} to {1} on {2}."],
         result=lambda a, r: (lambda c: say(f"The flight from {a[0]} to {a[1]} is booked, the number is {c}.", number=c))(code(r))),
    dict(id="hotel", names=["book_hotel", "reserve_hotel", "find_hotel", "hotel"],
         about=["Book a hotel room.", "Finds a hotel in a city.", ""],
         params=[CITY, (["nights", "stay"], "integer", ["Number of nights", ""], whole(1, 21))],
         asks=["Book a hotel in {0} for {1} nights.", "I need a hotel in {0} for {1} nights.", "Find me a hotel in {0} for {1} nights.",
               "Reserve a hotel room in {0}, {1} nights."],
         result=lambda a, r: (lambda n: say(f"The hotel in {a[0]} is {n}.", hotel=n))("Hotel " + proper(r, ["Central", "Royal", "Park", "Garden", "Star"]))),
    dict(id="search", names=["search", "web_search", "search_web", "google", "find_pages"],
         about=["Search the web.", "Searches the internet for a query.", "Find pages about something.", ""],
         params=[(["query", "q", "text", "terms"], "string", ["What to search for", "The query", "Search terms", ""], phrase)],
         asks=["Search for {0}.", "Search the web for {0}.", "Look up {0} on the web.", "Find pages about {0}.", "Google {0}.", "Search the internet for {0}."],
         result=lambda a, r: (lambda t: say(f"I found this page: {t}.", title=t))(phrase(r))),
    dict(id="news", names=["get_news", "news", "latest_news", "headlines"],
         about=["Get the latest news about a topic.", "Headlines on a subject.", ""],
         params=[(["topic", "subject"], "string", ["The topic", "What about", ""], phrase)],
         asks=["What is the news about {0}?", "Show me news on {0}.", "Any news about {0}?", "Latest news about {0}?", "Give me the headlines on {0}."],
         result=lambda a, r: (lambda t: say(f"The latest news: {t}.", headline=t))(phrase(r))),
    dict(id="translate", names=["translate", "translate_text", "translator"],
         about=["Translate a text.", "Translates text into a language.", ""],
         params=[(["text", "source_text"], "string", ["What to translate", "The text", ""], phrase),
                 (["language", "target", "to"], "string", ["Target language", "Into which language", ""], one_of(*LANGUAGES))],
         asks=["Translate {0} into {1}.", "Translate \"{0}\" to {1}.", "What is {0} in {1}?", "How do you say {0} in {1}?", "Say {0} in {1}."],
         result=lambda a, r: (lambda t: say(f"In {a[1]} it is: {t}.", translation=t))(" ".join(made_up(r) for _ in range(r.randint(1, 3))))),
    dict(id="event", names=["create_event", "add_event", "calendar_add", "schedule", "add_to_calendar"],
         about=["Create a calendar event.", "Adds an event to the calendar.", "Puts something into the calendar.", ""],
         params=[(["title", "name", "what"], "string", ["What it is", "Title of the event", ""], phrase), DATE, TIME],
         asks=["Add {0} to my calendar on {1} at {2}.", "Create an event {0} on {1} at {2}.", "Schedule {0} for {1} at {2}.", "Put {0} into my calendar on {1}.",
               "Schedule {0} on {1}.", "Create an event called {0} on {1}."],
         optional=[2],
         result=lambda a, r: say(f"{a[0]} is in your calendar on {a[1]}.", status=r.choice(["created", "ok"]))),
    dict(id="light", names=["set_light", "light", "switch_light", "control_light"],
         about=["Switch a light on or off.", "Controls the lights of a room.", ""],
         params=[ROOM, (["state", "switch"], ["on", "off"], ["On or off", "The new state", ""], None)],
         asks=["Turn {1} the light in the {0}.", "Switch {1} the light in the {0}.", "Turn the light in the {0} {1}.", "Light {1} in the {0}.",
               "Turn {1} the lights in the {0}.", "Switch the {0} light {1}."],
         result=lambda a, r: say(f"The light in the {a[0]} is {a[1]}.", status="ok")),
    dict(id="heating", names=["set_temperature", "heating", "thermostat", "set_heating"],
         about=["Set the temperature of a room.", "Controls the heating.", ""],
         params=[ROOM, (["degrees", "temperature", "value"], "number", ["Degrees", "The new temperature", ""], whole(10, 30))],
         asks=["Set the temperature in the {0} to {1} degrees.", "Heat the {0} to {1} degrees.", "Make it {1} degrees in the {0}.",
               "Set the heating in the {0} to {1}."],
         result=lambda a, r: say(f"The {a[0]} is set to {a[1]} degrees.", status="ok")),
    dict(id="restaurant", names=["find_restaurant", "restaurant_search", "restaurants", "book_table"],
         about=["Find a restaurant.", "Finds restaurants in a city.", ""],
         params=[CITY, (["cuisine", "food", "kind"], "string", ["Kind of food", "The cuisine", ""], one_of(*CUISINES))],
         asks=["Find a {1} restaurant in {0}.", "Where can I eat {1} food in {0}?", "Is there a {1} restaurant in {0}?", "I want {1} food in {0}.",
               "Find me a restaurant in {0}."],
         optional=[1],
         result=lambda a, r: (lambda n: say(f"A restaurant in {a[0]} is {n}.", name=n))(proper(r, ["Casa Rosa", "Golden Star", "The Garden", "Old Mill"]))),
    dict(id="distance", names=["get_distance", "distance", "route", "distance_between"],
         about=["Distance between two cities.", "How far it is between two places.", "Computes a distance.", ""],
         params=[(["from", "start", "origin"], "string", ["Where from", "First city", ""], city),
                 (["to", "end", "destination"], "string", ["Where to", "Second city", ""], city)],
         asks=["How far is it from {0} to {1}?", "What is the distance between {0} and {1}?", "Distance from {0} to {1}?", "How many kilometers from {0} to {1}?"],
         result=lambda a, r: (lambda n: say(f"It is {n} km from {a[0]} to {a[1]}.", kilometers=n))(r.randint(3, 9999))),
    dict(id="pizza", names=["order_pizza", "pizza", "order_food"],
         about=["Order pizza.", "Orders pizzas.", ""],
         params=[(["count", "number", "quantity"], "integer", ["How many", ""], whole(1, 12)),
                 (["size"], ["small", "medium", "large"], ["The size", ""], None)],
         asks=["Order {0} {1} pizzas.", "I want {0} {1} pizzas.", "Get me {0} {1} pizzas.", "Please order {0} {1} pizzas for us."],
         result=lambda a, r: (lambda n: say(f"The pizzas come in {n} minutes.", minutes=n))(r.randint(10, 90))),
    dict(id="music", names=["play_music", "play_song", "play", "music_player"],
         about=["Play music.", "Plays a song of an artist.", "Plays a song.", ""],
         params=[(["artist", "by", "singer"], "string", ["The artist", ""], person)],
         asks=["Play music by {0}.", "Play something by {0}.", "Play a song by {0}.", "I want to hear {0}.", "Put on some {0}."],
         result=lambda a, r: (lambda t: say(f"Now playing: {t} by {a[0]}.", song=t))(phrase(r))),
    dict(id="define", names=["define", "dictionary", "lookup_word", "define_word"],
         about=["Look a word up in the dictionary.", "Gives the definition of a word.", "Dictionary.", ""],
         params=[(["word", "term"], "string", ["The word", "Which word", ""], noun)],
         asks=["What does {0} mean?", "Define {0}.", "Look up the word {0}.", "What is the meaning of {0}?", "Give me the definition of {0}."],
         result=lambda a, r: (lambda t: say(f"The word {a[0]} means: {t}.", definition=t))(phrase(r))),
    dict(id="note", names=["create_note", "add_note", "note", "take_note", "remember"],
         about=["Write a note.", "Saves a note.", "Remember something.", ""],
         params=[(["text", "note", "content"], "string", ["What to note", "The text", ""], phrase)],
         asks=["Make a note: {0}.", "Note that {0}.", "Write down {0}.", "Remember {0}.", "Take a note: {0}.", "Save a note saying {0}."],
         result=lambda a, r: (lambda n: say(f"The note is saved as number {n}.", id=n))(r.randint(1, 999))),
    dict(id="todo", names=["add_todo", "add_task", "todo", "create_task"],
         about=["Add a task to the list.", "Adds something to the to-do list.", ""],
         params=[(["task", "title", "item"], "string", ["The task", "What to do", ""], phrase),
                 (["priority"], ["low", "normal", "high"], ["How urgent", "The priority", ""], None)],
         asks=["Add {0} to my to-do list.", "Put {0} on my list.", "Add the task {0} with {1} priority.", "New task: {0}, priority {1}.", "I have to do this: {0}."],
         optional=[1],
         result=lambda a, r: say(f"{a[0]} is on your list.", status=r.choice(["added", "ok"]))),
    dict(id="open", names=["open_url", "open_page", "fetch_url", "browse", "read_page"],
         about=["Open a web page.", "Fetches a page.", "Reads a URL.", ""],
         params=[(["url", "address", "page"], "string", ["The URL", "Address of the page", ""], url)],
         asks=["Open {0}", "Fetch {0}", "Go to {0}", "Read {0} please", "What is on {0}", "Show me {0}"],
         result=lambda a, r: (lambda t: say(f"The page says: {t}.", text=t))(phrase(r))),
    dict(id="read_file", names=["read_file", "cat", "open_file", "show_file", "get_file"],
         about=["Read a file.", "Shows what is in a file.", "Returns the contents of a file.", ""],
         params=[(["path", "file", "name"], "string", ["The file", "Path of the file", ""], file_name)],
         asks=["Read the file {0}", "Show me {0}", "What is in {0}", "Open the file {0}", "Print the file {0}"],
         result=lambda a, r: (lambda t: say(f"The file {a[0]} says: {t}.", text=t))(phrase(r))),
    dict(id="delete_file", names=["delete_file", "remove_file", "rm", "erase_file"],
         about=["Delete a file.", "Removes a file.", ""],
         params=[(["path", "file", "name"], "string", ["The file", "Path of the file", ""], file_name)],
         asks=["Delete the file {0}", "Remove {0}", "Erase the file {0}", "Get rid of {0}", "Delete {0}"],
         result=lambda a, r: say(f"The file {a[0]} is gone.", status=r.choice(["deleted", "ok"]))),
    dict(id="track", names=["track_package", "track_order", "package_status", "where_is_my_order"],
         about=["Track a package.", "Where a package is.", "Status of an order.", ""],
         params=[(["number", "id", "tracking_number", "order"], "string", ["Tracking number", "The number", ""], code)],
         asks=["Where is my package {0}?", "Track the package {0}.", "Track order {0}.", "What is the status of order {0}?", "Where is order {0}?"],
         result=lambda a, r: (lambda c: say(f"The package {a[0]} is in {c}.", location=c))(city(r))),
    dict(id="product", names=["find_product", "product_price", "get_price", "shop_search"],
         about=["Price of a product in the shop.", "Looks a product up.", "Finds the price of something.", ""],
         params=[(["product", "item", "name"], "string", ["The product", "Which item", ""], noun)],
         asks=["How much does a {0} cost?", "What is the price of a {0}?", "How expensive is a {0}?", "Look up the price of {0}.", "What do you charge for a {0}?"],
         result=lambda a, r: (lambda v: say(f"The price is {v} euros.", price=v))(r.randint(1, 999))),
    dict(id="call", names=["call", "phone", "make_call", "call_person", "dial"],
         about=["Call a person on the phone.", "Makes a phone call.", ""],
         params=[(["person", "name", "contact", "who"], "string", ["Whom to call", "Name of the contact", ""], person)],
         asks=["Call {0}.", "Phone {0}.", "Give {0} a call.", "Ring {0}.", "I want to talk to {0} on the phone.", "Make a call to {0}."],
         result=lambda a, r: say(f"I am calling {a[0]}.", status=r.choice(["calling", "ringing"]))),
    dict(id="contact", names=["find_contact", "get_contact", "phone_number", "lookup_contact"],
         about=["Look up a contact's phone number.", "Finds a phone number.", ""],
         params=[(["name", "person", "who"], "string", ["The name", "Whose number", ""], person)],
         asks=["What is the phone number of {0}?", "Find {0}'s phone number.", "What is {0}'s number?", "Look up the number of {0}."],
         result=lambda a, r: (lambda n: say(f"The number of {a[0]} is {n}.", number=n))("".join(r.choice("0123456789") for _ in range(r.randint(6, 9))))),
    dict(id="train", names=["next_train", "find_train", "train_times", "trains"],
         about=["Next train between two cities.", "Finds a train.", ""],
         params=[(["from", "origin", "start"], "string", ["Where from", "Departure", ""], city),
                 (["to", "destination", "goal"], "string", ["Where to", "Arrival", ""], city)],
         asks=["When is the next train from {0} to {1}?", "Find a train from {0} to {1}.", "I need a train from {0} to {1}.", "Which train goes from {0} to {1}?"],
         result=lambda a, r: (lambda t: say(f"The next train from {a[0]} to {a[1]} leaves at {t}.", departure=t))(clock(r))),
    dict(id="holiday", names=["get_holidays", "holidays", "public_holiday"],
         about=["Public holidays of a country or city.", "When the next holiday is.", ""],
         params=[(["place", "country", "where"], "string", ["Where", "The country", ""], city)],
         asks=["When is the next holiday in {0}?", "What holidays are there in {0}?", "Next public holiday in {0}?"],
         result=lambda a, r: (lambda d: say(f"The next holiday in {a[0]} is on {d}.", date=d))(date(r))),
    dict(id="random", names=["random_number", "roll", "roll_dice", "dice"],
         about=["Roll dice.", "Gives a random number.", ""],
         params=[(["sides", "max", "limit"], "integer", ["How many sides", "The largest number", ""], whole(2, 100))],
         asks=["Roll a die with {0} sides.", "Give me a random number up to {0}.", "Roll a {0} sided die.", "Pick a number from 1 to {0}."],
         result=lambda a, r: (lambda v: say(f"The number is {v}.", value=v))(r.randint(1, a[0]))),
    dict(id="user", names=["get_user", "find_user", "user_info", "lookup_user"],
         about=["Look up a user by id.", "Information about a user.", ""],
         params=[(["id", "user_id", "user"], "string", ["The user's id", "Which user", ""], code)],
         asks=["Who is user {0}?", "Look up user {0}.", "Find the user {0}.", "Get the user with id {0}.", "Show me user {0}."],
         result=lambda a, r: (lambda n: say(f"User {a[0]} is {n}.", name=n))(person(r))),
    dict(id="volume", names=["set_volume", "volume", "change_volume"],
         about=["Set the volume.", "Changes how loud it is.", ""],
         params=[(["level", "percent", "value"], "integer", ["How loud", "Percent", ""], whole(0, 100))],
         asks=["Set the volume to {0}.", "Volume {0}.", "Make it {0} percent loud.", "Change the volume to {0} percent."],
         result=lambda a, r: say(f"The volume is {a[0]} percent.", status="ok")),
    dict(id="reminder", names=["subscribe", "watch", "set_reminder", "remind"],
         about=["Set a reminder.", "Reminds you of something.", ""],
         params=[(["text", "what", "about"], "string", ["What about", "The reminder", ""], phrase), TIME],
         asks=["Remind me of {0} at {1}.", "Set a reminder for {1}: {0}.", "At {1} remind me about {0}.", "Reminder at {1}: {0}."],
         result=lambda a, r: say(f"I will remind you of {a[0]} at {a[1]}.", status="ok")),
]

VERBS = [("get", "Gets", "Get"), ("find", "Finds", "Find"), ("fetch", "Fetches", "Fetch"), ("check", "Checks", "Check"), ("read", "Reads", "Read"),
         ("show", "Shows", "Show me"), ("lookup", "Looks up", "Look up"), ("query", "Returns", "Tell me"), ("compute", "Computes", "What is")]
DEEDS = ["start", "stop", "open", "close", "reset", "clean", "paint", "sell", "buy", "repair", "lock", "unlock", "move", "copy", "test", "print", "cancel", "approve"]
OWNERS = ["name", "id", "key", "item", "object", "target", "value", "unit", "city", "user", "project", "device", "account"]


def invented(rng):
    """A tool nobody has: a thing asked about something, or a deed done to it."""
    owner = rng.choice(OWNERS) if rng.random() < 0.7 else made_up(rng)
    make = rng.choice([city, person, code, noun, made_up, phrase, file_name, date, whole(0, 9999)])
    kind = "integer" if isinstance(make(rng), int) else "string"
    about = rng.choice(["", f"The {owner}", f"Which {owner}"])
    if rng.random() < 0.6:
        verb, does, asks = rng.choice(VERBS)
        what = noun(rng)
        joint = rng.choice(["of", "of", "for"])
        return dict(id=f"get {what}", names=[f"{verb}_{what}" if rng.random() < 0.8 else f"{what}_{verb}"],
                    about=[f"{does} the {what} {joint} a {owner}.", f"{does} the {what}.", ""],
                    params=[([owner], kind, [about], make)],
                    asks=[f"{asks} the {what} {joint} {{0}}.", f"What is the {what} {joint} {{0}}?", f"I need the {what} {joint} {{0}}.",
                          f"Tell me the {what} {joint} {{0}}."],
                    result=lambda a, r: (lambda v: say(f"The {what} {joint} {a[0]} is {v}.", **{what: v}))(
                        rng.choice([code, noun, whole(0, 999), city, person])(r)))
    deed, what = rng.choice(DEEDS), noun(rng)
    return dict(id=f"{deed} {what}", names=[f"{deed}_{what}"],
                about=[f"{deed.capitalize()} a {what}.", f"Can {deed} the {what} of a {owner}.", ""],
                params=[([owner], kind, [about], make)],
                asks=[f"{deed.capitalize()} the {what} {{0}}.", f"Please {deed} the {what} {{0}}.", f"I want to {deed} the {what} {{0}}.",
                      f"Can you {deed} the {what} {{0}}?"],
                result=lambda a, r: say(f"The {what} {a[0]} is done.", status=r.choice(["ok", "done"])))


class Tool:
    """One declaration of a family, with the names that it happens to have."""

    def __init__(self, family, rng):
        self.family, self.name, self.slots = family, rng.choice(family["names"]), []
        optional = family.get("optional", [])
        properties, required, used = {}, [], set()
        for i, (names, kind, abouts, make) in enumerate(family["params"]):
            name = rng.choice([n for n in names if n not in used])
            used.add(name)
            schema = {"type": kind} if isinstance(kind, str) else {"type": "string", "enum": kind}
            about = rng.choice(abouts)
            if about:
                schema["description"] = about
            properties[name] = schema
            needed = i not in optional and not (family["id"] == "weather" and i == 1)
            if needed:
                required.append(name)
            self.slots.append((name, make or (lambda r, k=kind: r.choice(k)), needed))
        function = {"name": self.name, "description": rng.choice(family["about"]),
                    "parameters": {"type": "object", "properties": properties, "required": required}}
        if not function["description"]:
            del function["description"]
        self.json = {"type": "function", "function": function}

    def ask(self, rng):
        """(request, {parameter: value} in the order of the declaration, values by number)"""
        asks = self.family["asks"]
        names = [name for name, _, _ in self.slots]
        text = rng.choice(asks)
        values = [make(rng) for _, make, _ in self.slots]
        given = [i for i in range(len(values)) if "{%d}" % i in text]
        order = sorted(given, key=lambda i: (not self.slots[i][2], names[i]))
        return text.format(*values), {names[i]: values[i] for i in order}, values

    def result(self, values, rng):
        value, sentence = self.family["result"](values, rng)
        return json.dumps(value), sentence
