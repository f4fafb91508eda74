// SPDX-License-Identifier: Apache-2.0
// The last pass: around each indirect call, sibling call and computed goto it puts two pieces of
// assembly. Before it:
//
//   .Loptpoline_plugin_site7:
//           .skip N, 0x2e              as many prefixes as make it 5 bytes long; one at least
//                                      where its target is in memory, and a register is free
//   .Loptpoline_plugin_insn7:
//           call *%rax                 (the compiler's own, thunk or not)
//
// and behind it its end and its note, in a section of its own. The prefixes are of no effect and
// part of the instruction: the same number of instructions is executed, and `call rel32` fits in
// its place. How long the instruction is, with or without a thunk, is the assembler's to find out.
//
// Each text section has a note section that is linked to it (SHF_LINK_ORDER) and in its group, so
// that linkers keep, order and discard notes with their code.

#include <cstdarg>
#include <map>

#include "site.h"
#include "rtl.h"
#include "memmodel.h"
#include "emit-rtl.h"
#include "output.h"
#include "insn-addr.h"
#include "cgraph.h"
#include "stringpool.h"
#include "attribs.h"
#include "file-prefix-map.h"

// One note, as docs/declared.md describes it.
static const int VERSION = 1;
static const int KIND_INDIRECT_SITE = 8;
static const int FLAG_EXCLUDED = 16; // its programmer does not want it patched
static const int FLAG_COLD = 32;     // runs once, or hardly ever: not padded
static const int FLAG_GOTO = 64;     // leads to labels of its function, not to functions

// The one thing that is said about the architecture: what is put before a call so that a branch
// with a 32-bit displacement fits in its place. 0x2e, a CS override, is ignored in 64-bit mode.
static const int SITE_SIZE = 5;
static const int PREFIX = 0x2e;

static int n_sites;			   // of this compilation: names its labels
static std::map<section *, int> anchors;   // text sections that have a label already
static std::map<std::string, int> strings; // types and files, written at the end

static std::string
format (const char *pattern, ...)
{
  va_list args;
  va_start (args, pattern);
  char *text = xvasprintf (pattern, args);
  va_end (args);
  std::string result = text;
  free (text);
  return result;
}

// Return the difference from a note's field to a string, as an expression.
static std::string
refer_to (const std::string &text)
{
  if (text.empty ())
    return "0";
  auto added = strings.insert ({ text, (int) strings.size () });
  return format (".Loptpoline_plugin_string%d-.", added.first->second);
}

// Say whether code of this function runs once, or hardly ever, wherever in it.
static bool
is_cold_function (tree function)
{
  if (DECL_STATIC_CONSTRUCTOR (function) || DECL_STATIC_DESTRUCTOR (function)
      || lookup_attribute ("cold", DECL_ATTRIBUTES (function)))
    return true;
  const char *name = DECL_SECTION_NAME (function);
  for (const char *start : { ".init", ".fini", ".exit", ".text.unlikely" })
    if (name && startswith (name, start))
      return true;
  cgraph_node *node = cgraph_node::get (function);
  return node && node->frequency == NODE_FREQUENCY_UNLIKELY_EXECUTED;
}

// A computed goto. Jumps through switch tables are none: their targets are the compiler's.
static bool
is_goto (const rtx_insn *insn)
{
  return JUMP_P (insn) && computed_jump_p (insn);
}

static bool
is_indirect_call (const rtx_insn *insn)
{
  rtx call = CALL_P (insn) ? get_call_rtx_from (insn) : NULL_RTX;
  return call && !CONSTANT_P (XEXP (XEXP (call, 0), 0));
}

// Return where in the source a branch is. The compiler makes one of all computed gotos of a function
// for a while, and forgets; what comes before one is of its statement.
static expanded_location
locate (const rtx_insn *insn)
{
  while (insn && !(INSN_P (insn) && INSN_HAS_LOCATION (insn)))
    insn = LABEL_P (insn) ? NULL : PREV_INSN (insn);
  return expand_location (insn ? INSN_LOCATION (insn) : UNKNOWN_LOCATION);
}

struct site
{
  int flags;
  int n_branches;
  std::string type;
  std::string dead; // a register, where the target is in memory; "" where none is known
  expanded_location place;
  section *text;

  bool is_padded () const { return !(flags & (FLAG_EXCLUDED | FLAG_COLD)); }
};

static site
describe (const rtx_insn *insn, bool is_cold)
{
  site_tag tag = { { wish::NONE, 0 }, "" };
  if (is_goto (insn) || !carried_tag (insn, &tag))
    tag.choice = decide_function (current_function_decl);
  bool is_out = tag.choice.what == wish::OUT || (options.opt_in && tag.choice.what == wish::NONE);
  int flags = (is_out ? FLAG_EXCLUDED : 0) | (is_cold ? FLAG_COLD : 0)
	      | (is_goto (insn) ? FLAG_GOTO : 0);
  const char *dead = find_dead_name (insn);
  return { flags, tag.choice.n_branches, tag.type, dead ? dead : "", locate (insn),
	   current_function_section () };
}

static std::string
write_before (const site &made, int number)
{
  std::string text;
  if (anchors.insert ({ made.text, anchors.size () }).second)
    text = format (".Loptpoline_plugin_text%d:\n", anchors[made.text]);
  text += format (".Loptpoline_plugin_site%d:\n", number);
  if (made.is_padded ())
    {
      // One prefix at least tells probes of other tools to stay away; where the target is in a
      // register, there always is one.
      int n_least = made.dead.empty () ? 0 : 1;
      std::string missing = format ("(%d-(.Loptpoline_plugin_end%d-.Loptpoline_plugin_insn%d))",
				    SITE_SIZE - n_least, number, number);
      // To an assembler, true is -1.
      text += format ("\t.skip %d-(", n_least) + missing + ">0)*" + missing
	      + format (",%#x\n", PREFIX);
    }
  return text + format (".Loptpoline_plugin_insn%d:", number);
}

static std::string
write_behind (const site &made, int number)
{
  std::string file;
  if (made.place.file)
    file = remap_debug_filename (made.place.file);
  std::string text = format (".Loptpoline_plugin_end%d:\n", number);
  text += format ("\t.pushsection optpoline_notes,\"a?o\",@note,.Loptpoline_plugin_text%d\n",
		  anchors[made.text]);
  text += "\t.balign 4\n";
  // An ELF note: sizes of owner and description, type, owner.
  text += "\t.long 10,36,0x706f\n\t.asciz \"optpoline\"\n\t.balign 4\n";
  text += format ("\t.byte %d,%d,%d,.Loptpoline_plugin_end%d-.Loptpoline_plugin_site%d\n", VERSION,
		  KIND_INDIRECT_SITE, made.flags, number, number);
  text += format ("\t.long .Loptpoline_plugin_site%d-.\n", number);
  text += "\t.long " + refer_to (made.dead) + "\n"; // in the place of the object
  text += "\t.long 0,0\n";			   // target, name
  text += "\t.long " + refer_to (made.type) + "\n";
  text += "\t.long " + refer_to (file) + "\n";
  text += format ("\t.long %d,%d\n", made.place.line, made.n_branches);
  return text + "\t.popsection";
}

// Return a piece of assembly that goes beside a branch.
static rtx
build_asm (const std::string &text)
{
  // Its own place is only for comments; it must have one.
  return gen_rtx_ASM_INPUT_loc (VOIDmode, ggc_strdup (text.c_str ()), BUILTINS_LOCATION);
}

static void
finish_asm (rtx_insn *insn, const rtx_insn *marked)
{
  INSN_LOCATION (insn) = INSN_LOCATION (marked); // no .loc between the pieces
  INSN_ADDRESSES_NEW (insn, -1);		 // the pass that knows lengths is over
}

static const pass_data mark_data = { RTL_PASS, "optpoline_mark", OPTGROUP_NONE, TV_PLUGIN_RUN,
				     0, 0, 0, 0, 0 };

class mark_pass : public rtl_opt_pass
{
public:
  mark_pass (gcc::context *ctxt) : rtl_opt_pass (mark_data, ctxt) {}

  unsigned int execute (function *) override;
};

unsigned int
mark_pass::execute (function *)
{
  bool was_cold = in_cold_section_p;
  in_cold_section_p = false;
  bool is_cold = is_cold_function (current_function_decl);
  rtx_insn *next;
  for (rtx_insn *insn = get_insns (); insn; insn = next)
    {
      next = NEXT_INSN (insn);
      if (NOTE_P (insn) && NOTE_KIND (insn) == NOTE_INSN_SWITCH_TEXT_SECTIONS)
	in_cold_section_p = !in_cold_section_p; // current_function_section() asks this
      if (!is_goto (insn) && !is_indirect_call (insn))
	continue;
      site made = describe (insn, is_cold || in_cold_section_p);
      int number = n_sites++;
      std::string before = write_before (made, number);
      finish_asm (emit_insn_before (build_asm (before), insn), insn);
      finish_asm (emit_insn_after (build_asm (write_behind (made, number)), insn), insn);
    }
  in_cold_section_p = was_cold;
  return 0;
}

// Write all strings that notes refer to, where the linker merges equal ones.
void
write_strings (void *, void *)
{
  if (strings.empty () || !asm_out_file)
    return;
  fputs ("\t.pushsection .rodata.optpoline.str1.1,\"aMS\",@progbits,1\n", asm_out_file);
  for (auto &entry : strings)
    {
      fprintf (asm_out_file, ".Loptpoline_plugin_string%d:\n\t.string \"", entry.second);
      for (char letter : entry.first)
	{
	  if (letter == '"' || letter == '\\')
	    putc ('\\', asm_out_file);
	  putc (letter, asm_out_file);
	}
      fputs ("\"\n", asm_out_file);
    }
  fputs ("\t.popsection\n", asm_out_file);
}

opt_pass *
make_mark_pass (gcc::context *ctxt)
{
  return new mark_pass (ctxt);
}
