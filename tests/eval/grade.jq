# jq -n --slurpfile expected expected.jsonl --slurpfile requests requests.jsonl -f grade.jq answers.jsonl
# For each kind of question: how many there were, called a tool, called with arguments that the tool's schema
# allows, were right. Right is: the one tool and exactly its arguments; the sum's number; no call and the
# answer that training gives to such questions; the sentence with what the tool returned.

def by_id: map({key: .custom_id, value: .}) | from_entries;

def fits($schema):
  if $schema.enum then . as $v | $schema.enum | any(. == $v)
  elif $schema.type == "integer" then type == "number" and . == floor
  else type == $schema.type end;

def valid($parameters):
  . as $args
  | ($parameters.required // [] | all(. as $name | $args | has($name)))
    and (to_entries | all(. as $e | $parameters.properties[$e.key] != null and ($e.value | fits($parameters.properties[$e.key]))));

($expected | by_id) as $want
| ($requests | by_id) as $asked
| [inputs | .custom_id as $id
   | .response.body.choices[0] as $choice
   | $choice.message as $m
   | ($m.tool_calls // []) as $calls
   | $want[$id] as $w
   | ([$calls[].function | (.arguments | fromjson? // null) as $args | .name as $name
       | [$asked[$id].body.tools[]?.function | select(.name == $name)] as $tool
       | ($tool | length) == 1 and ($args | type) == "object" and ($args | valid($tool[0].parameters))] | all) as $valid
   | {kind: $w.kind, id: $id, called: ($calls | length > 0), valid: ($valid and ($calls | length > 0)),
      right: (if $w.name then ($calls | length) == 1 and $calls[0].function.name == $w.name
                and ($calls[0].function.arguments | fromjson? // null) == $w.arguments
              elif $w.kind == "arithmetic" then ($calls | length) == 0 and ($m.content // "" | sub(".*= "; "")) == ($w.content | sub(".*= "; ""))
              else ($calls | length) == 0 and $m.content == $w.content end)}]
| group_by(.kind)
| map({key: .[0].kind, value: {asked: length, called: map(select(.called)) | length, valid: map(select(.valid)) | length,
                               right: map(select(.right)) | length, wrong: map(select(.right | not) | .id)}})
| from_entries
